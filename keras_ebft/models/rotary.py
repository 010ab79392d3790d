"""Rotary position embeddings of a GGUF file, as settings of a backbone."""

import math

import numpy as np

# Llama 3.1 and its successors: low and high frequency factor, first length.
LLAMA3_SCALING = (1.0, 4.0, 8192)
FACTORS = "rope_freqs.weight"


def rotary_settings(file, head_dim):
    """Wavelength and scaling.

    Args:
        file: `GGUFFile`.
        head_dim: int.

    Returns:
        `(theta, linear, llama3)`: the base; the factor by which positions are
        divided; and the factor of Llama 3.1's scaling of frequencies, or `None`.

    Raises:
        ValueError: for what KerasHub has no setting for.
    """
    turned = file.setting("{arch}.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise ValueError(
            f"Expected rotary embeddings of whole heads, {head_dim} wide. Received: "
            f"{file.path}, which turns {turned}. Such models cannot be read."
        )
    theta = float(file.setting("{arch}.rope.freq_base", 10000.0))
    linear = _linear_factor(file)
    llama3 = None
    if file.has(FACTORS):
        llama3 = _llama3_factor(file, theta, head_dim)
    return theta, linear, llama3


def _linear_factor(file):
    kind = file.setting("{arch}.rope.scaling.type", "none")
    factor = file.setting("{arch}.rope.scaling.factor", None)
    if factor is None:
        # As files named it first.
        factor = file.setting("{arch}.rope.scale_linear", None)
        kind = kind if factor is None else "linear"
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise ValueError(
            "Expected rotary embeddings without scaling, with linear scaling or that "
            f"of Llama 3. Received: {file.path} with {kind!r}, which KerasHub's model "
            "has no setting for. Use a model of shorter context."
        )
    return float(factor)


def _llama3_factor(file, theta, head_dim):
    """The factor, if frequencies are divided just as Llama 3.1 divides them."""
    given = file.tensor(FACTORS)
    factor = float(np.round(given.max(), 3))
    expected = llama3_divisors(theta, head_dim, factor)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-3):
        raise ValueError(
            "Expected frequencies of rotary embeddings scaled as Llama 3.1 scales "
            f"them. Received: {file.path} with others, which KerasHub's model has no "
            "setting for. Use a model of shorter context."
        )
    return factor


def llama3_divisors(theta, head_dim, factor):
    """What Llama 3.1 divides frequencies by, `[head_dim / 2]`."""
    low, high, length = LLAMA3_SCALING
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
