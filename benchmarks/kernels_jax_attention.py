"""The strided mask in attention kernels of others, on JAX.

They take one row of keys: the document's, then those of all blocks. Queries are in the
order of blocks, so that each key is seen by one range of queries.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

# Splash attention's tiles.
TILE = 128


def as_rows(spec, query, key, value, document_key, document_value):
    """`(query, key, value)`, `[B, N, H, d]` and `[B, T + N, Hkv, d]`."""

    def by_block(tensor):
        tensor = tensor.swapaxes(1, 2)
        return tensor.reshape(tensor.shape[0], -1, *tensor.shape[-2:])

    return (
        by_block(query),
        jnp.concatenate([document_key, by_block(key)], axis=1),
        jnp.concatenate([document_value, by_block(value)], axis=1),
    )


def key_ranges(spec):
    """First query that sees each key and one past the last, int32 `[T + N]`."""
    count = spec.samples * spec.blocks * spec.queries
    anchors, _ = spec.places()
    before = np.searchsorted(anchors, np.arange(spec.length), side="right")
    own = np.arange(count)
    first = np.concatenate([before * spec.samples * spec.queries, own])
    last = np.concatenate(
        [np.full(spec.length, count), own // spec.queries * spec.queries + spec.queries]
    )
    return first.astype("int32"), last.astype("int32")


def dense_mask(spec):
    """Bool array `[N, T + N]`."""
    first, last = key_ranges(spec)
    query = np.arange(last.max())[:, None]
    return (query >= first) & (query < last)


def jax_nn(implementation):
    """`jax.nn.dot_product_attention` with the mask as an array."""

    def make(spec):
        mask = jnp.asarray(dense_mask(spec))[None, None]

        def run(query, key, value):
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, scale=spec.scale,
                implementation=implementation,
            )  # fmt: skip

        return run

    return make


def tokamax(implementation):
    """Its attention kernels with the mask as two numbers per key, a private class."""

    def make(spec):
        from absl import flags
        from tokamax._src.ops.attention import api, base

        # It would read this script's arguments as flags of its own.
        flags.FLAGS.mark_as_parsed()
        first, last = (jnp.asarray(ends)[None, None] for ends in key_ranges(spec))
        attend = api.IMPLEMENTATIONS[implementation]

        def run(query, key, value):
            mask = base.Mask(q_start=first, q_end=last)
            return attend(query, key, value, mask=mask, logits_scale=spec.scale)

        return run

    return make


def splash(spec, interpret=False):
    """Splash attention, sides padded to its tiles."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = dense_mask(spec)
    padding = [(0, -size % TILE) for size in mask.shape]
    # A query of padding must see something.
    mask = np.pad(mask, padding)
    mask[:, 0] |= ~mask.any(axis=1)
    masks = [splash_attention.NumpyMask(mask)] * spec.heads
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask(masks), interpret=interpret
    )

    def run(query, key, value):
        rows, columns = (((0, 0), pad, (0, 0), (0, 0)) for pad in padding)
        count = query.shape[1]
        query, key, value = (
            jnp.pad(tensor, pad).swapaxes(1, 2)
            for tensor, pad in ((query, rows), (key, columns), (value, columns))
        )
        output = jax.vmap(kernel)(query * spec.scale, key, value)
        return output.swapaxes(1, 2)[:, :count]

    return run


def available(device):
    """Functions of a spec that return an attention, by name."""
    found = {"jax.nn": jax_nn("xla")}
    if device == "gpu":
        found["jax.nn, cudnn"] = jax_nn("cudnn")
    if importlib.util.find_spec("tokamax"):
        # On TPU it has no such mask; on CPU its plain form shows that ours is right.
        names = {"gpu": ("triton", "mosaic_gpu"), "cpu": ("xla",)}.get(device, ())
        found |= {f"tokamax, {name}": tokamax(name) for name in names}
    if device != "gpu":
        interpret = device == "cpu"
        found["splash"] = lambda spec: splash(spec, interpret)
    return found


def error(make, spec, arguments):
    """Relative error against the definition: that the mask is the same."""
    from keras_ebft.kernels.strided_attention.reference import (
        strided_attention_reference,
    )

    found = jax.jit(make(spec))(*as_rows(spec, *arguments))
    with jax.default_matmul_precision("highest"):
        exact = strided_attention_reference(
            *(argument.astype("float32") for argument in arguments),
            spec.places()[0],
            **spec.options(),
        )
    exact = exact.swapaxes(1, 2).reshape(found.shape)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
