"""The serving route: KerasHub's own way to supply the attention of a model.

It is private API, so the version is checked that it was tested with.
"""

import contextlib

import keras_hub
from keras import ops

TESTED_VERSIONS = ("0.32",)

# Their plain forward pass attends to everything where it runs fused attention (JAX
# and PyTorch), although the route reports a sliding window. What is trained must be
# what `generate` and `predict` run.
WINDOWLESS_WHEN_FUSED = ("QwenBackbone", "Qwen3Backbone")


@contextlib.contextmanager
def serving_route(attend, backbone, positions):
    """Context in which the attention layers of a backbone call `attend`.

    Args:
        attend: function `(query, key, value, scale, sliding_window, soft_cap)` of
            `[tokens, heads, head_dim]` tensors, returns the output.
        backbone: KerasHub backbone of a family on the serving route.
        positions: int32 tensor `[tokens, 1]`.
    """
    windowless = type(backbone).__name__ in WINDOWLESS_WHEN_FUSED and _fused()

    def routed(
        cache,
        query,
        key,
        value,
        scale,
        head_dim,
        num_heads,
        num_kv_heads,
        sliding_window=None,
        soft_cap=None,
    ):
        output = attend(
            ops.reshape(query, (-1, num_heads, head_dim)),
            ops.reshape(key, (-1, num_kv_heads, head_dim)),
            ops.reshape(value, (-1, num_kv_heads, head_dim)),
            scale,
            None if windowless else sliding_window,
            soft_cap,
        )
        return cache, ops.reshape(output, (-1, num_heads * head_dim))

    check_version()
    from keras_hub.src.vllm.context import vllm_context_scope

    with vllm_context_scope(routed, ops.reshape(positions, (-1,))):
        yield


def check_version():
    """Raises a `ValueError` unless KerasHub is a version that was tested."""
    version = keras_hub.__version__
    if not version.startswith(TESTED_VERSIONS):
        raise ValueError(
            "keras_ebft routes attention through a part of KerasHub that was "
            f"tested with versions {', '.join(TESTED_VERSIONS)}. Received: "
            f"keras-hub {version}. Install a tested version: "
            f'pip install "keras-hub=={TESTED_VERSIONS[-1]}.*"'
        )


def _fused():
    from keras_hub.src.utils.keras_utils import fused_attention_op_available

    return fused_attention_op_available()
