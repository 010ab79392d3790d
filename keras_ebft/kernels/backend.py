"""The one place that branches on the Keras backend."""

import contextlib

import keras
import numpy as np


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


def float_tensors(structure):
    """Splits a structure in what has gradients and what has not.

    Args:
        structure: nested tuples, lists and dicts of tensors and anything else.

    Returns:
        `(tensors, rebuild)`: the float tensors, and a function of as many tensors
        that returns the structure with those in their places.
    """
    leaves = keras.tree.flatten(structure)
    places = [place for place, leaf in enumerate(leaves) if _is_float(leaf)]

    def rebuild(*tensors):
        filled = list(leaves)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        return keras.tree.pack_sequence_as(structure, filled)

    return [leaves[place] for place in places], rebuild


def _is_float(leaf):
    if not keras.ops.is_tensor(leaf):
        return False
    return "float" in keras.backend.standardize_dtype(leaf.dtype)


def map_groups(function, groups, shared=()):
    """Applies a function to one group after another.

    What a group computes on the way is forgotten, and computed again in the
    backward pass: one group's activations are in memory at a time.

    Args:
        function: `function(group, shared)` returns a structure of tensors. Besides
            `shared` it may read Keras variables, and integers from outside; float
            tensors from outside get no gradient on every backend.
        groups: list or dict of tensors `[groups, ...]`, which get no gradient.
        shared: structure of tensors that all groups read, with gradient.

    Returns:
        The structure that `function` returns, each tensor `[groups, ...]`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        run = jax.checkpoint(lambda group: function(group, shared))
        return jax.lax.map(run, groups)
    if backend == "tensorflow":
        return _map_groups_tensorflow(function, groups, shared)
    import torch

    found = []
    for index in range(keras.tree.flatten(groups)[0].shape[0]):
        group = keras.tree.map_structure(lambda tensor, i=index: tensor[i], groups)
        found.append(
            torch.utils.checkpoint.checkpoint(
                function, group, shared, use_reentrant=False
            )
        )
    return keras.tree.map_structure(lambda *parts: torch.stack(parts), *found)


def _map_groups_tensorflow(function, groups, shared):
    """A loop in either direction, because gradients of loops keep what they did."""
    import tensorflow as tf

    size = keras.tree.flatten(groups)[0].shape[0]
    tensors, rebuild = float_tensors(shared)

    def take(structure, index):
        return keras.tree.map_structure(lambda tensor: tensor[index], structure)

    def run(index, tensors):
        return function(take(groups, index), rebuild(*tensors))

    @tf.custom_gradient
    def mapped(*tensors):
        traced = tf.function(lambda: run(0, tensors), autograph=False)
        returned = traced.get_concrete_function().structured_outputs
        outputs = tf.map_fn(
            lambda index: run(index, tensors),
            tf.range(size),
            fn_output_signature=tf.nest.map_structure(
                tf.TensorSpec.from_tensor, returned
            ),
            parallel_iterations=1,
        )

        def gradient(*upstream, variables=()):
            structure = tf.nest.pack_sequence_as(returned, upstream)

            def add(index, sums):
                local = [tf.identity(tensor) for tensor in tensors]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([*local, *variables])
                    found = run(index, local)
                found = tf.nest.flatten(found)
                wanted = tf.nest.flatten(take(structure, index))
                pairs = [(f, w) for f, w in zip(found, wanted) if f.dtype.is_floating]
                new = tape.gradient(
                    [f for f, _ in pairs],
                    [*local, *variables],
                    output_gradients=[w for _, w in pairs],
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
                return index + 1, [
                    s + tf.convert_to_tensor(g) for s, g in zip(sums, new)
                ]

            zeros = [tf.zeros_like(value) for value in [*tensors, *variables]]
            _, sums = tf.while_loop(
                lambda index, _: index < size,
                add,
                (tf.constant(0), zeros),
                parallel_iterations=1,
            )
            return sums[: len(tensors)], sums[len(tensors) :]

        return outputs, gradient

    return mapped(*tensors)
