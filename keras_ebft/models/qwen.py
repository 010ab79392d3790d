"""KerasHub's Qwen 2, with a tokenizer that ends where the model ends."""

import keras
import keras_hub

from keras_ebft.models.byte_pairs import OwnBytePairs
from keras_ebft.models.llama import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class QwenTokenizer(OwnBytePairs, keras_hub.models.QwenTokenizer):
    """A byte-pair tokenizer that splits words as its model did."""
