"""What KerasHub's byte-pair tokenizers leave out of a model's own tokenizer."""

import json
from pathlib import Path

from keras_hub.tokenizers import BytePairTokenizer

from keras_ebft.models.splitting import split_as


class OwnBytePairs:
    """Mixin: splits words as the model did, and keeps its tokens and template.

    KerasHub's tokenizers split every text as Llama 3 does, forget in their
    configuration which tokens begin and end a text, and know no chat template.

    Args:
        vocabulary: dict from tokens to ids, or `None` until assets are loaded.
        merges: list of strings, pairs in the order they are merged.
        way: str, how words are split; see `keras_ebft.models.splitting`.
        start_token: str put before texts, or `None`.
        end_token: str at which `generate` stops, put after documents.
        end_token2: str at which `generate` stops too, or `None`.
        bos_token: str, what the model calls its first token though none is put
            before texts.
        special_tokens: list of strings that are never split and left out of
            generated text.
        unsplittable_tokens: list of strings that are never split.
        chat_template: str, Jinja source, or `None`.
        **kwargs: of `keras_hub.tokenizers.BytePairTokenizer`.
    """

    def __init__(
        self,
        vocabulary=None,
        merges=None,
        way="llama3",
        start_token=None,
        end_token="<|end_of_text|>",
        end_token2=None,
        bos_token=None,
        special_tokens=(),
        unsplittable_tokens=None,
        chat_template=None,
        **kwargs,
    ):
        self._settings = {
            "way": way,
            "start_token": start_token,
            "end_token": end_token,
            "end_token2": end_token2,
            "bos_token": bos_token,
            "special_tokens": list(special_tokens),
            "chat_template": chat_template,
        }
        self.chat_template = chat_template
        self.start_token = self.start_token_id = None
        self.pad_token_id = 0
        self._name_special_tokens()
        BytePairTokenizer.__init__(
            self,
            vocabulary=vocabulary,
            merges=merges,
            unsplittable_tokens=unsplittable_tokens,
            **kwargs,
        )

    def _name_special_tokens(self):
        settings = self._settings
        named = {name: settings[name] for name in ("start_token", "end_token")}
        named["end_token2"] = settings["end_token2"]
        others = [
            token for token in settings["special_tokens"] if token not in named.values()
        ]
        named |= {f"special_token_{i:03d}": token for i, token in enumerate(others)}
        for name, token in named.items():
            if token is not None:
                self._add_special_token(token, name)

    def _set_vocabulary_and_merges_tokenizers(self, vocabulary, merges):
        super()._set_vocabulary_and_merges_tokenizers(vocabulary, merges)
        split_as(self._tokenizer, self._settings["way"])

    def get_config(self):
        """Everything but vocabulary and merges, which are files of their own."""
        return {**super().get_config(), **self._settings}

    def write_hugging_face(self, path: str | Path) -> None:
        """Writes the tokenizer in the Hugging Face layout, template included.

        Args:
            path: folder.
        """
        path = Path(path)
        self._maybe_initialized_tokenizers()
        self._tokenizer.save(str(path / "tokenizer.json"))
        settings = self._settings
        tokens = {
            "bos_token": settings["start_token"] or settings["bos_token"],
            "eos_token": settings["end_token"],
            "pad_token": self.id_to_token(self.pad_token_id),
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "add_bos_token": settings["start_token"] is not None,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (path / "tokenizer_config.json").write_text(text, "utf-8")
        if self.chat_template is not None:
            (path / "chat_template.jinja").write_text(self.chat_template, "utf-8")
