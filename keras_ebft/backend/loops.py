"""Loops over steps that are alike, each with weights of its own."""

import keras

from keras_ebft.backend.runtime import backend_name


def compiles_every_step():
    """Whether steps written one after another are compiled one by one.

    XLA makes a program of each: for a network of 30 layers most of the first call.
    TensorFlow's graph and PyTorch begin sooner without a loop.
    """
    return backend_name() == "jax"


def loop(step, carry, inputs, count):
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


def stacked(structures):
    """Structures of tensors and `None` as one, tensors on a new first axis."""

    def stack(*parts):
        return None if parts[0] is None else keras.ops.stack(parts)

    return keras.tree.map_structure(stack, *structures)


def slices(structure, index):
    """The part `index` of every tensor of a structure; `None` stays `None`."""
    return keras.tree.map_structure(
        lambda tensor: None if tensor is None else tensor[index], structure
    )
