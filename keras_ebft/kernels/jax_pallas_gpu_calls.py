"""How kernels for GPU are called in Pallas."""

import contextlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

# Three products of TensorFloat-32 that together are as good as one of float32.
FLOAT32_PRODUCTS = lax.DotAlgorithmPreset.TF32_TF32_F32_X3.name


def float32_products(dtype, interpret):
    """Context in which products of float32 tensors that are traced are float32.

    Where `jax_default_matmul_precision` is set they are what it asks for. Left to
    itself Triton cuts float32 off to TensorFloat-32, which loses three times of
    what XLA loses by rounding to it.
    """
    is_asked = jax.config.jax_default_matmul_precision is not None
    if interpret or is_asked or dtype != jnp.float32:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(FLOAT32_PRODUCTS)


def gpu_call(kernel, *, interpret, **options):
    """`pallas_call` of a kernel, with `float32_products` of its first argument."""
    call = pl.pallas_call(kernel, interpret=interpret, **options)

    def run(*arrays):
        # The kernel is traced here.
        with float32_products(arrays[0].dtype, interpret):
            return call(*arrays)

    return run
