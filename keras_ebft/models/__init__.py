"""Language models out of files that are at hand, as KerasHub models."""

from keras_ebft.models.gguf_models import from_gguf
from keras_ebft.models.llama import (
    Llama3Backbone,
    Llama3CausalLM,
    Llama3CausalLMPreprocessor,
    Llama3Tokenizer,
)
from keras_ebft.models.qwen import QwenTokenizer
from keras_ebft.models.smollm import smollm2
from keras_ebft.models.templates import chat_template

__all__ = [
    "Llama3Backbone",
    "Llama3CausalLM",
    "Llama3CausalLMPreprocessor",
    "Llama3Tokenizer",
    "QwenTokenizer",
    "chat_template",
    "from_gguf",
    "smollm2",
]
