"""Samples of a step, read group after group to save memory."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ebft.backend.gradients import map_groups
from keras_ebft.typing import Tensor


def in_groups(
    function: Callable[[Any, Any], Any],
    num_groups: int,
    samples: dict[str, Tensor],
    shared: Any = (),
) -> Any:
    """Applies a function to groups of samples, keeping one group's activations.

    With stride and rollout length alike, one sample of all blocks has about as many
    tokens as the document, which is read as a whole: smaller groups than of one
    sample would save little more.

    Args:
        function: `function(samples, shared)` of a part of the samples; returns a
            structure of tensors `[B, n', ...]`, and reads no other float tensors.
        num_groups: int. Where n is no multiple of it, as many groups as divide both.
        samples: dict of tensors `[B, n, ...]` without gradient.
        shared: structure of tensors that get a gradient.

    Returns:
        The structure with tensors `[B, n, ...]`, and the gradient as without groups.
    """
    count = next(iter(samples.values())).shape[1]
    num_groups = math.gcd(num_groups, count)
    if num_groups == 1:
        return function(samples, shared)

    def split(tensor: Tensor) -> Tensor:
        batch, _, *rest = tensor.shape
        shape = (batch, num_groups, count // num_groups, *rest)
        return ops.moveaxis(ops.reshape(tensor, shape), 1, 0)

    def join(tensor: Tensor) -> Tensor:
        _, batch, _, *rest = tensor.shape
        return ops.reshape(ops.moveaxis(tensor, 0, 1), (batch, count, *rest))

    found = map_groups(function, keras.tree.map_structure(split, samples), shared)
    return keras.tree.map_structure(join, found)
