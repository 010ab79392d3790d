"""Strings as token ids, by way of a model's own preprocessor."""

import numpy as np

from keras_ebft.networks.families import family_of_preprocessor


def preprocess_texts(preprocessor, texts):
    """Token ids of texts, with the start and end token a preprocessor adds.

    Args:
        preprocessor: `keras_hub.models.CausalLMPreprocessor`.
        texts: list of strings.

    Returns:
        `(token_ids, mask)`: int array and bool array `[N, sequence_length]`, real
        tokens on the left.
    """
    x, family = texts, family_of_preprocessor(preprocessor)
    if family is not None and family.prompts_apart:
        x = {"prompts": [""] * len(texts), "responses": texts}
    # The preprocessor splits T tokens into T-1 inputs and T-1 shifted labels.
    inputs, labels, weights = preprocessor(
        x, sequence_length=preprocessor.sequence_length - 1
    )
    token_ids = _joined(inputs["token_ids"], labels)
    mask = _joined(inputs["padding_mask"], weights).astype(bool)
    # RWKV-7's pads on the left.
    order = np.argsort(~mask, axis=1, kind="stable")
    return (
        np.take_along_axis(token_ids, order, axis=1),
        np.take_along_axis(mask, order, axis=1),
    )


def _joined(inputs, labels):
    inputs, labels = to_numpy(inputs), to_numpy(labels)
    return np.concatenate([inputs, labels[:, -1:]], axis=1)


def to_numpy(value):
    """A tensor of any framework, or anything like an array, as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def export_tokenizer(tokenizer, path):
    """Writes a tokenizer in the Hugging Face layout.

    Args:
        tokenizer: KerasHub tokenizer.
        path: folder.

    Returns:
        bool, whether KerasHub has a layout for it; if not, nothing is written.
    """
    from keras_hub.src.utils.transformers.export import hf_exporter

    if type(tokenizer).__name__ not in hf_exporter.MODEL_TOKENIZER_CONFIGS:
        return False
    hf_exporter.export_tokenizer(tokenizer, str(path))
    return True
