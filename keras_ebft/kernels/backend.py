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


def compiled(function, variables):
    """Compiles a function of tensors that reads Keras variables, where it pays.

    Op by op, JAX compiles every loop anew in each call; TensorFlow and PyTorch
    run op by op well enough that compiling for a few calls costs more.

    Args:
        function: function of tensors; must not assign variables.
        variables: function without arguments that returns the variables read.

    Returns:
        A function of the same tensors, differentiable as before.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    @jax.jit
    def stateless(values, *tensors):
        with keras.StatelessScope(state_mapping=list(zip(variables(), values))):
            return function(*tensors)

    def call(*tensors):
        return stateless([variable.value for variable in variables()], *tensors)

    return call
