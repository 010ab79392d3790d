"""KerasHub's Llama 3, with configurations that say everything.

KerasHub's own forget that input and output embeddings are one, so that such
models do not load again, and which tokens begin and end a text. The classes have
the names of those they repair and do nothing else differently.
"""

import keras
import keras_hub

from keras_ebft.models.byte_pairs import OwnBytePairs

PACKAGE = "keras_ebft"


@keras.saving.register_keras_serializable(package=PACKAGE)
class Llama3Backbone(keras_hub.models.Llama3Backbone):
    """`keras_hub.models.Llama3Backbone`; tied embeddings survive saving."""

    def get_config(self):
        """The whole configuration."""
        return {
            **super().get_config(),
            "tie_word_embeddings": self.tie_word_embeddings,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class Llama3Tokenizer(OwnBytePairs, keras_hub.models.Llama3Tokenizer):
    """A byte-pair tokenizer that splits words as its model did."""

    backbone_cls = Llama3Backbone


@keras.saving.register_keras_serializable(package=PACKAGE)
class Llama3CausalLMPreprocessor(keras_hub.models.Llama3CausalLMPreprocessor):
    """`keras_hub.models.Llama3CausalLMPreprocessor` for these classes."""

    backbone_cls = Llama3Backbone
    tokenizer_cls = Llama3Tokenizer


@keras.saving.register_keras_serializable(package=PACKAGE)
class Llama3CausalLM(keras_hub.models.Llama3CausalLM):
    """`keras_hub.models.Llama3CausalLM` for these classes."""

    backbone_cls = Llama3Backbone
    preprocessor_cls = Llama3CausalLMPreprocessor
