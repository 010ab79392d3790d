"""Loops over steps that are alike, each with weights of its own."""

from collections.abc import Callable
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name


def compiles_every_step() -> bool:
    """Whether steps written one after another are compiled one by one.

    XLA makes a program of each, and TensorFlow a part of its graph: for a network of 30
    layers most of the first call. What runs op by op begins sooner without a loop.
    """
    if backend_name() != "tensorflow":
        return backend_name() == "jax"
    import tensorflow as tf

    return not tf.executing_eagerly()


def loop(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: list[Any]
) -> tuple[Any, list[Any]]:
    """Applies a step to one of its inputs after another, with gradient.

    Args:
        step: function `(carry, inputs) -> (carry, output)` of structures of tensors
            and `None`, alike for all steps.
        carry: structure of tensors.
        inputs: list with the inputs of each step.

    Returns:
        `(carry, outputs)`, outputs a list with one of each step.
    """
    return _LOOPS[backend_name()](step, carry, inputs)


def _loop_jax(step: Any, carry: Any, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """A loop over stacked inputs."""
    import jax

    count = len(inputs)
    carry, outputs = jax.lax.scan(step, carry, _stacked(inputs), length=count)
    return carry, [_slices(outputs, index) for index in range(count)]


def _loop_tensorflow(step: Any, carry: Any, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """One graph of the step that is called every time.

    Faster than a loop, which would copy all inputs into a stack.
    """
    import tensorflow as tf

    # What is not put in line is traced, differentiated and optimized once.
    attributes = {"_noinline": True}
    function = tf.function(step, autograph=False, experimental_attributes=attributes)
    # Not variables, by which the graph would not be differentiated.
    inputs = keras.tree.map_structure(
        lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), inputs
    )
    return _one_by_one(function, carry, inputs)


def _one_by_one(step: Any, carry: Any, inputs: list[Any]) -> tuple[Any, list[Any]]:
    outputs = []
    for own in inputs:
        carry, output = step(carry, own)
        outputs.append(output)
    return carry, outputs


_LOOPS = {
    "jax": _loop_jax,
    "tensorflow": _loop_tensorflow,
    "torch": _one_by_one,
}


def _stacked(structures: list[Any]) -> Any:
    """Structures of tensors and `None` as one, tensors on a new first axis."""

    def stack(*parts: Any) -> Any:
        return None if parts[0] is None else keras.ops.stack(parts)

    return keras.tree.map_structure(stack, *structures)


def _slices(structure: Any, index: int) -> Any:
    """The part `index` of every tensor of a structure; `None` stays `None`."""
    return keras.tree.map_structure(
        lambda tensor: None if tensor is None else tensor[index], structure
    )
