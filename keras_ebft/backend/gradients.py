"""Gradients and loops that each backend spells in its own way."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import keras

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# A training makes some ten different calls: one per path, pass and shape.
MOST_CALLS_KNOWN = 256


def may_have_gradient(tensor: Tensor) -> bool:
    """Whether a gradient by a tensor may be asked for.

    PyTorch says of each tensor whether it will be; elsewhere what nobody asks for
    costs nothing, because the compiler leaves it out.
    """
    return backend_name() != "torch" or bool(tensor.requires_grad)


def differentiable(
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    options: Hashable,
    tensors: tuple[Tensor, ...],
    num_differentiated: int,
) -> Tensor:
    """Calls a function whose gradient is written out.

    Compiled, a call of the same functions, options and shapes is traced once, not
    in every layer that makes it.

    Args:
        forward: function `(options, *tensors)` that returns a tuple: the result, and
            what else `backward` needs, without gradient of its own. One that is
            defined once, not one of each call: it is what calls are known by.
        backward: function `(options, tensors, outputs, upstream)`, with what
            `forward` returned and the gradient by the result; returns the gradients
            by the first `num_differentiated` tensors. Defined once, too.
        options: hashable, all else that the two depend on.
        tensors: tuple of tensors.
        num_differentiated: int; the remaining tensors have no gradient.

    Returns:
        The result, the first output of `forward`.
    """
    num_others = len(tensors) - num_differentiated
    call = _Call(forward, backward, options, num_others)
    return _DIFFERENTIABLE[backend_name()](call, tensors)


class _Call(NamedTuple):
    forward: Callable
    backward: Callable
    options: Hashable
    num_others: int

    def outputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `forward` returns."""
        return self.forward(self.options, *tensors)

    def gradients(
        self, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients by all tensors, `None` for those that have none."""
        found = self.backward(self.options, tensors, outputs, upstream)
        return (*found, *[None] * self.num_others)


def _differentiable_jax(call: _Call, tensors: tuple[Tensor, ...]) -> Tensor:
    return _jax_function(call)(*tensors)


def forget_programs() -> None:
    """Has every call of `differentiable` traced anew."""
    _jax_function.cache_clear()
    _tensorflow_functions.cache_clear()


@functools.lru_cache(maxsize=MOST_CALLS_KNOWN)
def _jax_function(call: _Call) -> Callable[..., Tensor]:
    import jax

    @jax.custom_vjp
    def function(*tensors: Tensor) -> Tensor:
        return call.outputs(*tensors)[0]

    def with_residuals(*tensors: Tensor) -> tuple[Tensor, Any]:
        outputs = call.outputs(*tensors)
        return outputs[0], (tensors, outputs)

    def gradients(
        residuals: tuple[Any, Any], upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        return call.gradients(*residuals, upstream)

    function.defvjp(jax.jit(with_residuals), jax.jit(gradients))
    return jax.jit(function)


def _differentiable_tensorflow(call: _Call, tensors: tuple[Tensor, ...]) -> Tensor:
    import tensorflow as tf

    @tf.custom_gradient
    def function(*tensors: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        # A tape that watched the graphs below would look for their gradients.
        tensors = tuple(tf.stop_gradient(tensor) for tensor in tensors)
        specs = tuple(tf.TensorSpec(t.shape, t.dtype) for t in tensors)
        run, pull = _tensorflow_functions(call, specs)
        outputs = run(*tensors)

        def gradient(upstream: Tensor) -> list[Tensor | None]:
            found = pull(tensors, outputs, tf.stop_gradient(upstream))
            return [*found, *[None] * call.num_others]

        return outputs[0], gradient

    # What is still a variable would not count as an argument.
    return function(*(tf.convert_to_tensor(tensor) for tensor in tensors))


@functools.lru_cache(maxsize=MOST_CALLS_KNOWN)
def _tensorflow_functions(
    call: _Call, specs: tuple[Any, ...]
) -> tuple[Callable[..., Any], ...]:
    """`forward` and `backward` as graphs, for tensors like `specs`."""
    import tensorflow as tf

    # Partial functions: TensorFlow warns of one piece of code that is traced often.
    attributes = {"_noinline": True}
    return tuple(
        tf.function(function, autograph=False, experimental_attributes=attributes)
        for function in (
            functools.partial(call.forward, call.options),
            functools.partial(call.backward, call.options),
        )
    )


def _differentiable_torch(call: _Call, tensors: tuple[Tensor, ...]) -> Tensor:
    return _torch_function().apply(call, *tensors)


@functools.cache
def _torch_function() -> Any:
    """One class for all calls: a class of each call, which refers to itself, would
    keep the call's tensors until Python looks for cycles.
    """
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
            outputs = call.outputs(*tensors)
            # Saved the official way, so that rematerialisation can drop them.
            ctx.save_for_backward(*tensors, *outputs)
            ctx.call, ctx.num_inputs = call, len(tensors)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            inputs, outputs = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
            with torch.no_grad():
                return (None, *ctx.call.gradients(inputs, outputs, upstream))

    return Function


_DIFFERENTIABLE = {
    "jax": _differentiable_jax,
    "tensorflow": _differentiable_tensorflow,
    "torch": _differentiable_torch,
}


def scan_tiles(
    function: Callable[[Any, Any], tuple[Any, Any]],
    count: int,
    carry: tuple[Tensor, ...],
    like: tuple[tuple[Any, Any], ...],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
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
    if backend_name() == "torch":
        # Updating in place would copy everything stacked so far each time.
        found = []
        for index in range(count):
            carry, outputs = function(index, carry)
            found.append(outputs)
        return carry, tuple(ops.stack(outputs) for outputs in zip(*found))
    if count == 1:
        carry, outputs = function(ops.convert_to_tensor(0, dtype="int32"), carry)
        return carry, tuple(output[None] for output in outputs)
    if backend_name() == "tensorflow":
        return _scan_tiles_tensorflow(function, count, carry, like)
    num_carried = len(carry)

    def body(index: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        carry, outputs = function(index, state[:num_carried])
        stacked = (
            ops.slice_update(whole, (index, *(0 for _ in output.shape)), output[None])
            for whole, output in zip(state[num_carried:], outputs)
        )
        return (*carry, *stacked)

    stacked = (ops.zeros((count, *shape), dtype=dtype) for shape, dtype in like)
    state = ops.fori_loop(0, count, body, (*carry, *stacked))
    return state[:num_carried], state[num_carried:]


def _scan_tiles_tensorflow(
    function: Callable[[Any, Any], tuple[Any, Any]],
    count: int,
    carry: tuple[Tensor, ...],
    like: tuple[tuple[Any, Any], ...],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs in arrays of tensors: an update of a slice copies all the others."""
    import tensorflow as tf

    arrays = tuple(
        tf.TensorArray(dtype, size=count, element_shape=shape) for shape, dtype in like
    )

    def body(index: Tensor, carry: Any, arrays: Any) -> tuple[Any, ...]:
        carry, outputs = function(index, carry)
        written = (array.write(index, one) for array, one in zip(arrays, outputs))
        return index + 1, tuple(carry), tuple(written)

    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < count,
        body,
        (tf.constant(0), tuple(carry), arrays),
        parallel_iterations=1,
    )
    return carry, tuple(array.stack() for array in arrays)


def float_tensors(structure: Any) -> tuple[list[Tensor], Callable[..., Any]]:
    """Splits a structure in what has gradients and what has not.

    Args:
        structure: nested tuples, lists and dicts of tensors and anything else.

    Returns:
        `(tensors, rebuild)`: the float tensors, and a function of as many tensors
        that returns the structure with those in their places.
    """
    leaves = keras.tree.flatten(structure)
    places = [place for place, leaf in enumerate(leaves) if _is_float(leaf)]

    def rebuild(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        return keras.tree.pack_sequence_as(structure, filled)

    return [leaves[place] for place in places], rebuild


def _is_float(leaf: Any) -> bool:
    if not keras.ops.is_tensor(leaf):
        return False
    return "float" in keras.backend.standardize_dtype(leaf.dtype)


def map_groups(
    function: Callable[[Any, Any], Any], groups: Any, shared: Any = ()
) -> Any:
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
    backend = backend_name()
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


def _map_groups_tensorflow(
    function: Callable[[Any, Any], Any], groups: Any, shared: Any
) -> Any:
    """A loop in either direction, because gradients of loops keep what they did."""
    import tensorflow as tf

    size = keras.tree.flatten(groups)[0].shape[0]
    tensors, rebuild = float_tensors(shared)

    def run(index: Tensor, tensors: Any) -> Any:
        return function(_take(groups, index), rebuild(*tensors))

    @tf.custom_gradient
    def mapped(*tensors: Tensor) -> tuple[Any, Callable[..., Any]]:
        traced = tf.function(lambda: run(0, tensors), autograph=False)
        returned = traced.get_concrete_function().structured_outputs
        outputs = tf.map_fn(
            # AutoGraph would rewrite every function called, which takes longer than to
            # call them.
            tf.autograph.experimental.do_not_convert(lambda index: run(index, tensors)),
            tf.range(size),
            fn_output_signature=tf.nest.map_structure(
                tf.TensorSpec.from_tensor, returned
            ),
            parallel_iterations=1,
        )

        def gradient(
            *upstream: Tensor, variables: Any = ()
        ) -> tuple[list[Tensor], list[Tensor]]:
            upstream = tf.nest.pack_sequence_as(returned, upstream)
            sums = _summed_gradients(run, size, tensors, variables, upstream)
            return sums[: len(tensors)], sums[len(tensors) :]

        return outputs, gradient

    return mapped(*tensors)


def _summed_gradients(
    run: Callable[[Any, Any], Any],
    size: int,
    tensors: Any,
    variables: Any,
    upstream: Any,
) -> list[Tensor]:
    """Gradients of all groups in a TensorFlow loop that keeps one group's tape.

    Args:
        run: function of the index of a group and `tensors`.
        size: int, number of groups.
        tensors: list of tensors that gradients are by.
        variables: list of variables that gradients are by.
        upstream: structure that `run` returns, each tensor `[size, ...]`.

    Returns:
        list of tensors, shaped like `[*tensors, *variables]`.
    """
    import tensorflow as tf

    def add(index: Tensor, sums: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        local = [tf.identity(tensor) for tensor in tensors]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([*local, *variables])
            found = tf.nest.flatten(run(index, local))
        wanted = tf.nest.flatten(_take(upstream, index))
        pairs = [(f, w) for f, w in zip(found, wanted) if f.dtype.is_floating]
        new = tape.gradient(
            [f for f, _ in pairs],
            [*local, *variables],
            output_gradients=[w for _, w in pairs],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return index + 1, [s + tf.convert_to_tensor(g) for s, g in zip(sums, new)]

    _, sums = tf.while_loop(
        lambda index, _: index < size,
        add,
        (tf.constant(0), [tf.zeros_like(value) for value in [*tensors, *variables]]),
        parallel_iterations=1,
    )
    return sums


def _take(structure: Any, index: Tensor) -> Any:
    """One group of a structure of tensors `[groups, ...]`."""
    return keras.tree.map_structure(lambda tensor: tensor[index], structure)
