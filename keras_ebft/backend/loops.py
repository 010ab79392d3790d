"""Loops over steps that are alike, each with weights of its own."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name


def compiles_every_step() -> bool:
    """Whether steps written one after another are compiled one by one.

    XLA makes a program of each: for a network of 30 layers most of the first call.
    TensorFlow's graph and PyTorch begin sooner without a loop.
    """
    return backend_name() == "jax"


def loop(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, count: int
) -> tuple[Any, Any]:
    """Applies a step to one slice of its inputs after another, with gradient.

    Args:
        step: function `(carry, inputs) -> (carry, output)`.
        carry: structure of tensors.
        inputs: structure of tensors `[count, ...]`, of which a step gets one each, and
            `None`.
        count: int.

    Returns:
        `(carry, outputs)`, outputs stacked on a new first axis; `None` among them
        stays `None`.
    """
    if backend_name() == "jax":
        import jax

        return jax.lax.scan(step, carry, inputs, length=count)
    outputs = []
    for index in range(count):
        carry, output = step(carry, slices(inputs, index))
        outputs.append(output)
    return carry, stacked(outputs)


def stacked(structures: Iterable[Any]) -> Any:
    """Structures of tensors and `None` as one, tensors on a new first axis."""

    def stack(*parts: Any) -> Any:
        return None if parts[0] is None else keras.ops.stack(parts)

    return keras.tree.map_structure(stack, *structures)


def slices(structure: Any, index: Any) -> Any:
    """The part `index` of every tensor of a structure; `None` stays `None`."""
    return keras.tree.map_structure(
        lambda tensor: None if tensor is None else tensor[index], structure
    )
