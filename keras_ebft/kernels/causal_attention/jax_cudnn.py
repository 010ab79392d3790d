"""`causal_attention` through cuDNN's fused attention, on JAX."""

import jax
import jax.numpy as jnp

# Tokens that rows are padded to a multiple of: cuDNN has no odd lengths.
LENGTH_STEP = 64


def causal_attention_cudnn(
    query, key, value, *, scale, starts=None, sliding_window=None, soft_cap=None
):
    """See `keras_ebft.kernels.causal_attention`; without documents and caps."""
    del starts, soft_cap
    length = query.shape[1]
    # No token sees the padding, which comes after all of them.
    padding = ((0, 0), (0, -length % LENGTH_STEP), (0, 0), (0, 0))
    output = jax.nn.dot_product_attention(
        *(jnp.pad(tensor, padding) for tensor in (query, key, value)),
        scale=scale,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=_implementation(),
    )
    return output[:, :length]


def _implementation():
    """cuDNN; where there is no GPU, as in tests, the plain form of the same call."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"
