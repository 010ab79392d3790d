"""Optimizers of Keras that see some numbers of their weights, and nothing else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from keras_ebft.backend.runtime import backend_name
from keras_ebft.typing import Tensor

# What stands in for methods of an optimizer belongs to that of the whole weights.
_REPLACED = ("apply", "_apply_weight_decay", "_backend_update_step")


class Held(keras.Variable):
    """Numbers of a weight or of a slot, as its optimizer sees them."""

    def __init__(self, value: Tensor) -> None:
        # Keras' own would give it memory and a place among a layer's variables.
        self._value = value
        self._shape = tuple(value.shape)
        self._dtype = keras.backend.standardize_dtype(value.dtype)
        self._autocast = False
        self._name = self._path = "held"

    def _direct_assign(self, value: Tensor) -> None:
        if backend_name() == "torch":
            # Into the memory it was made with, a weight's own perhaps.
            super()._direct_assign(value)
        else:
            self._value = value


class Weight(NamedTuple):
    """Numbers of one weight, those of its slots, and what its optimizer knows of it."""

    number: int
    decays: bool
    value: Held
    slots: dict[str, Held]

    def held(self) -> list[Held]:
        """The weight and its slots."""
        return [self.value, *self.slots.values()]


def slots_of(
    optimizer: keras.optimizers.Optimizer, index: int
) -> dict[str, keras.Variable]:
    """An optimizer's slots of one weight.

    Args:
        optimizer: one whose slots are lists in the order of the weights.
        index: int, the weight's place among them.

    Returns:
        dict: names of these lists, and the weight's variable in each.
    """
    return {
        name: slots[index]
        for name, slots in vars(optimizer).items()
        if isinstance(slots, list)
        and name not in ("_variables", "_trainable_variables")
        and index < len(slots)
        and isinstance(slots[index], keras.Variable)
    }


def seeing(optimizer: Any, weights: Sequence[Weight]) -> Any:
    """The same optimizer, for which there is nothing but some weights.

    Args:
        optimizer: Keras optimizer; stays as it is.
        weights: list of `Weight`.

    Returns:
        An optimizer whose methods take `Held` values of these weights.
    """
    seen = object.__new__(type(optimizer))
    known = {id(weight.value): weight for weight in weights}
    slots: dict[str, dict[int, Held]] = {}
    for weight in weights:
        for name, slot in weight.slots.items():
            slots.setdefault(name, {})[weight.number] = slot
    methods = {
        "_get_variable_index": lambda variable: known[id(variable)].number,
        "_use_weight_decay": lambda variable: known[id(variable)].decays,
    }
    own = {
        name: value for name, value in vars(optimizer).items() if name not in _REPLACED
    }
    # Past the trackers of Keras and TensorFlow.
    vars(seen).update({**own, **slots, **methods})
    return seen
