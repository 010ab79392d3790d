"""Conversations as text, by the template of the model that reads them."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from keras_ebft.configurable import Shown
from keras_ebft.validation import check_bool

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
MOST_INDENT = 16
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Messages: TypeAlias = list[dict[str, Any]]


class ChatTemplate(Shown):
    """Turns lists of messages into texts, or pairs of prompt and answer.

    Templates are written in Jinja and come with the folder of an instruction-tuned
    model in the Hugging Face layout; presets in KerasHub's own layout have none.
    They run in Jinja's sandbox, and what they make and how long they run is limited.
    The start token at the very beginning is left out, because KerasHub's preprocessors
    add it; those of Qwen, for one, do not, and then it has to stay. The token that
    ends an answer stays, because a tokenizer's own end token may be another; where it
    is the same, `fit` and `keras_ebft.data.pack` do not add it twice.

    Args:
        template: str, Jinja source.
        keep_start_token: bool, whether the start token that a template begins with
            stays in the text, for a preprocessor that adds none.
        **tokens: strings the template may use, such as `eos_token="</s>"`.

    Raises:
        ImportError: if `jinja2` is not installed.
        TypeError: if `template` is no string.
        ValueError: if the template is not valid Jinja.

    Example:
    >>> template = ChatTemplate(
    ...     "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    ...     "{% if add_generation_prompt %}[assistant] {% endif %}"
    ... )
    >>> question = {"role": "user", "content": "1 + 1?"}
    >>> template.pair([question, {"role": "assistant", "content": "2"}])
    ('[user] 1 + 1? [assistant] ', '2 ')
    """

    def __init__(
        self, template: str, *, keep_start_token: bool = False, **tokens: Any
    ) -> None:
        self.keep_start_token = check_bool("keep_start_token", keep_start_token)
        self.tokens = {name: token for name, token in tokens.items() if token}
        self.template = template
        self._template = _compile(template)

    def _shown_settings(self) -> dict[str, Any]:
        return {"template": self.template, **self.tokens}

    @classmethod
    def from_preset(
        cls, folder: str | Path, *, keep_start_token: bool = False
    ) -> "ChatTemplate":
        """The template of a model in the Hugging Face layout.

        Args:
            folder: path with `chat_template.jinja`, or with a `chat_template` in
                its `tokenizer_config.json`.
            keep_start_token: bool, as of the constructor.

        Raises:
            ValueError: if the folder has neither.
        """
        folder = Path(folder)
        settings = folder / SETTINGS_FILE
        config = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
        options = {name: _content(config.get(name)) for name in TOKENS}
        options["keep_start_token"] = keep_start_token
        if (folder / TEMPLATE_FILE).exists():
            return cls((folder / TEMPLATE_FILE).read_text("utf-8"), **options)
        template = config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        if template is None:
            raise ValueError(
                f"Expected a folder with {TEMPLATE_FILE}, or with a chat_template in "
                f"{SETTINGS_FILE}. Received: {folder}, which has neither. Use the "
                "folder of an instruction-tuned model in the Hugging Face layout, or "
                "give the template itself: ChatTemplate(text)."
            )
        return cls(template, **options)

    def __call__(self, messages: Messages) -> str:
        """A whole conversation as text.

        Args:
            messages: list of dicts with `role` and `content`.

        Returns:
            str, for `fit` or `keras_ebft.data.pack`.

        Raises:
            ValueError: for anything else, or messages the template refuses.
        """
        return self._render(messages)

    def prompt(self, messages: Messages) -> str:
        """Messages as text that an answer can follow, for `generate`."""
        return self._render(messages, add_generation_prompt=True)

    def pair(self, messages: Messages) -> tuple[str, str]:
        """`(prompt, answer)`: the last message, of the assistant, is the answer.

        A tuple of strings, which `keras_ebft.data.pack` makes rows with an
        `answer_mask` of.

        Raises:
            ValueError: unless the last message is the assistant's, or where the
                template writes earlier messages otherwise when an answer follows.
        """
        whole = self(messages)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                "Expected messages that end with an answer of the assistant. Received: "
                f"{len(messages)} messages, the last of the {messages[-1]['role']}."
            )
        prompt = self.prompt(messages[:-1])
        if not whole.startswith(prompt):
            raise ValueError(
                "Expected a template that writes messages alike before and after they "
                "are answered. Received: one that does not. Use the whole "
                "conversation as text: template(messages)."
            )
        return prompt, whole[len(prompt) :]

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        _check_messages(messages)
        from keras_ebft.data.limited_templates import joined, limited_time

        tokens = {"bos_token": "", "eos_token": "", **self.tokens}
        parts = self._template.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens
        )
        try:
            with limited_time():
                text = joined(parts)
        except Exception as error:
            # Whatever an expression in Python can raise.
            raise ValueError(
                f"Expected messages that the template knows. Received: "
                f"{_shorten(messages)}; the template says: {_shorten(error)}."
            ) from error
        return text if self.keep_start_token else text.removeprefix(tokens["bos_token"])


def _compile(template: str) -> Any:
    try:
        import jinja2

        from keras_ebft.data.limited_templates import make_environment
    except ImportError as error:
        raise ImportError(
            "Expected the package jinja2, which chat templates are written for. "
            'Install it: pip install "keras_ebft[chat]".'
        ) from error
    if not isinstance(template, str):
        raise TypeError(
            "Expected `template` to be a string, Jinja source. Received: "
            f"{_shorten(template)} (of type {type(template).__name__})."
        )
    environment = make_environment()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
        # A `break` outside of a loop is an error of the Python that Jinja writes.
        raise ValueError(
            f"Expected a template in Jinja. Received: {template[:40]!r}...; {error}."
        ) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    indent = None if indent is None else min(indent, MOST_INDENT)
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> Any:
    import jinja2

    raise jinja2.TemplateError(message)


def _content(token: Any) -> Any:
    # Written as a string or with its settings.
    return token.get("content") if isinstance(token, dict) else token


def _check_messages(messages: Any) -> None:
    valid = isinstance(messages, (list, tuple)) and len(messages) > 0
    if not valid or not all(
        isinstance(message, dict) and {"role", "content"} <= set(message)
        for message in messages
    ):
        raise ValueError(
            "Expected a list of messages, dicts with 'role' and 'content'. Received: "
            f"{_shorten(messages)}. Pass one conversation at a time."
        )


def _shorten(value: Any) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
