"""The one place that branches on the Keras backend."""

import contextlib

import keras
import numpy as np


def backend_name():
    """Name of the running Keras backend."""
    return keras.backend.backend()


def no_gradient():
    """Context in which no gradient is recorded.

    JAX and TensorFlow drop what `stop_gradient` cuts off; PyTorch builds the
    autograd graph regardless, and with it keeps every activation of sampling.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def resolve_jit_compile(jit_compile, runs_python=False):
    """What `jit_compile="auto"` means here: compiled on JAX and TensorFlow.

    Keras' own "auto" leaves TensorFlow on CPU uncompiled.

    Args:
        jit_compile: bool or `"auto"`.
        runs_python: bool, whether the step calls Python (`call_python`), which
            XLA allows on JAX only.

    Raises:
        ValueError: where a compiled step cannot call Python.
    """
    callable_from = ("jax",) if runs_python else ("jax", "tensorflow")
    if jit_compile == "auto":
        return keras.backend.backend() in callable_from
    if jit_compile and runs_python and keras.backend.backend() == "tensorflow":
        raise ValueError(
            "Expected no XLA compilation on TensorFlow with a reward that runs "
            "Python code, which XLA cannot call. Received: jit_compile=True. Use "
            'jit_compile="auto" or False.'
        )
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


def call_python(function, shape, *tensors):
    """Calls a Python function of arrays from within a step, compiled or not.

    Args:
        function: takes NumPy arrays, returns a float32 array of `shape`; may have
            effects of its own, and is called once per step.
        shape: tuple of ints.
        *tensors: its arguments; no gradient flows through.

    Returns:
        float32 tensor of `shape`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax
        from jax.experimental import io_callback

        result = jax.ShapeDtypeStruct(shape, "float32")
        return io_callback(
            lambda *arrays: function(*(np.asarray(array) for array in arrays)),
            result,
            *tensors,
        )
    if backend == "tensorflow":
        import tensorflow as tf

        result = tf.numpy_function(function, tensors, tf.float32)
        return tf.ensure_shape(result, shape)
    arrays = [keras.ops.convert_to_numpy(tensor) for tensor in tensors]
    return keras.ops.convert_to_tensor(function(*arrays))


def run_in_state(model, state, function):
    """Runs a function that may assign non-trainable variables of a model.

    Args:
        model: `keras.Model`.
        state: what a train step gets before its batch: on JAX a list with the
            values of all variables, elsewhere empty.
        function: function without arguments.

    Returns:
        `(value, state)`: what the function returned and the new state.
    """
    if not state:
        return function(), state
    (trainable, non_trainable, *others) = state[0]
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    mapping = list(zip(variables, [*trainable, *non_trainable]))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        value = function()
    updated = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return value, [(trainable, updated, *others)]


def differentiable(forward, backward, tensors, num_differentiated):
    """Calls a function whose gradient is written out.

    Args:
        forward: function of `tensors` that returns a tuple: the result, and what
            else `backward` needs, without gradient of its own.
        backward: function `(tensors, outputs, upstream)`, with what `forward`
            returned and the gradient by the result; returns the gradients by the
            first `num_differentiated` tensors.
        tensors: tuple of tensors; neither function may close over others.
        num_differentiated: int; the remaining tensors have no gradient.

    Returns:
        The result, the first output of `forward`.
    """
    return _DIFFERENTIABLE[keras.backend.backend()](
        forward, backward, tensors, [None] * (len(tensors) - num_differentiated)
    )


def _differentiable_jax(forward, backward, tensors, no_gradients):
    import jax

    @jax.custom_vjp
    def function(*tensors):
        return forward(*tensors)[0]

    def with_residuals(*tensors):
        outputs = forward(*tensors)
        return outputs[0], (tensors, outputs)

    def gradient(residuals, upstream):
        return (*backward(*residuals, upstream), *no_gradients)

    function.defvjp(with_residuals, gradient)
    return function(*tensors)


def _differentiable_tensorflow(forward, backward, tensors, no_gradients):
    import tensorflow as tf

    @tf.custom_gradient
    def function(*tensors):
        outputs = forward(*tensors)

        def gradient(upstream):
            return [*backward(tensors, outputs, upstream), *no_gradients]

        return outputs[0], gradient

    return function(*tensors)


def _differentiable_torch(forward, backward, tensors, no_gradients):
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            outputs = forward(*tensors)
            # Saved the official way, so that rematerialisation can drop them.
            ctx.save_for_backward(*tensors, *outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx, upstream):
            saved = ctx.saved_tensors
            inputs, outputs = saved[: len(tensors)], saved[len(tensors) :]
            with torch.no_grad():
                return (*backward(inputs, outputs, upstream), *no_gradients)

    return Function.apply(*tensors)


_DIFFERENTIABLE = {
    "jax": _differentiable_jax,
    "tensorflow": _differentiable_tensorflow,
    "torch": _differentiable_torch,
}


def scan_tiles(function, count, carry, like):
    """Calls a function on 0 ... count - 1, one after the other, without gradient.

    Args:
        function: function `(index, carry) -> (carry, outputs)` of tuples of
            tensors; `index` is an int where the backend runs op by op (PyTorch),
            otherwise a tensor.
        count: int, at least 1.
        carry: tuple of tensors.
        like: tuple of `(shape, dtype)` of the outputs.

    Returns:
        `(carry, stacked)`: the last carry, and outputs stacked on a new first axis.
    """
    ops = keras.ops
    if keras.backend.backend() == "torch":
        # Updating in place would copy everything stacked so far each time.
        found = []
        for index in range(count):
            carry, outputs = function(index, carry)
            found.append(outputs)
        return carry, tuple(ops.stack(outputs) for outputs in zip(*found))
    if count == 1:
        carry, outputs = function(ops.convert_to_tensor(0, dtype="int32"), carry)
        return carry, tuple(output[None] for output in outputs)
    num_carried = len(carry)

    def body(index, state):
        carry, outputs = function(index, state[:num_carried])
        stacked = (
            ops.slice_update(whole, (index, *(0 for _ in output.shape)), output[None])
            for whole, output in zip(state[num_carried:], outputs)
        )
        return (*carry, *stacked)

    stacked = (ops.zeros((count, *shape), dtype=dtype) for shape, dtype in like)
    state = ops.fori_loop(0, count, body, (*carry, *stacked))
    return state[:num_carried], state[num_carried:]
