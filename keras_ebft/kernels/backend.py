"""The one place that branches on the Keras backend."""

import contextlib

import keras


def no_gradient():
    """Context in which no gradient is recorded.

    JAX and TensorFlow drop what `stop_gradient` cuts off; PyTorch builds the
    autograd graph regardless, and with it keeps every activation of sampling.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def resolve_jit_compile(jit_compile):
    """What `jit_compile="auto"` means here: compiled on JAX and TensorFlow.

    Keras' own "auto" leaves TensorFlow on CPU uncompiled.
    """
    if jit_compile == "auto":
        return keras.backend.backend() != "torch"
    return jit_compile
