"""Updates of some rows of weights at a time, for PyTorch.

Few enough that a processor's cache holds them: an optimizer goes over its numbers a
dozen times, and memory is slower than that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from keras_ebft.backend.device import device_of
from keras_ebft.backend.runtime import no_gradient
from keras_ebft.backend.seen_weights import Held, Weight, seeing, slots_of
from keras_ebft.typing import Tensor

# Elements of the rows that are updated together: a processor's cache holds them, their
# gradient and slots; an accelerator has many cores to keep busy.
CACHED = {"cpu": 2**18}
ON_ACCELERATORS = 2**22


class _Rows(NamedTuple):
    """Rows of one weight, all of it where there are no axes."""

    place: int
    start: int
    stop: int

    def of(self, value: Tensor) -> Tensor:
        return value[self.start : self.stop] if value.ndim else value


def rows_of(
    variables: Sequence[keras.Variable], elements: int
) -> Iterator[list[_Rows]]:
    """Rows that follow one another, together no more than some elements.

    Args:
        variables: list of Keras variables.
        elements: int; a single row may have more.

    Yields:
        lists of `(place, start, stop)`, no weight twice in one of them.
    """
    found: list[_Rows] = []
    room = elements
    for place, variable in enumerate(variables):
        count = variable.shape[0] if len(variable.shape) else 1
        width = max(math.prod(variable.shape) // max(count, 1), 1)
        start = 0
        while start < count:
            if found and room < width:
                yield found
                found, room = [], elements
            stop = min(start + max(room // width, 1), count)
            found.append(_Rows(place, start, stop))
            room -= (stop - start) * width
            start = stop
    if found:
        yield found


def by_rows(
    optimizer: keras.optimizers.Optimizer, all_finite: Callable[[Sequence[Any]], Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """`partial_updates.rehearsal_and_update`, some rows after others."""

    def all_rows(variables: Any) -> Iterator[list[_Rows]]:
        platform = device_of(variables[0]).platform
        return rows_of(variables, CACHED.get(platform, ON_ACCELERATORS))

    def rehearse(gradients: Any, variables: Any, learning_rate: Any) -> Tensor:
        found = all_finite([])
        for rows in all_rows(variables):
            weights = _weights(optimizer, variables, rows, copied=True)
            _update_rows(optimizer, weights, gradients, rows, learning_rate)
            values = [held.value for weight in weights for held in weight.held()]
            found = keras.ops.logical_and(found, all_finite(values))
        return found

    def update(gradients: Any, variables: Any, learning_rate: Any) -> None:
        for rows in all_rows(variables):
            weights = _weights(optimizer, variables, rows, copied=False)
            _update_rows(optimizer, weights, gradients, rows, learning_rate)

    return rehearse, update


def _weights(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    rows: Sequence[_Rows],
    copied: bool,
) -> list[Weight]:
    def held(variable: keras.Variable, part: _Rows) -> Held:
        value = part.of(variable.value)
        return Held(keras.ops.copy(value) if copied else value)

    weights = []
    for part in rows:
        variable = variables[part.place]
        index = optimizer._get_variable_index(variable)
        slots = {
            name: held(slot, part) for name, slot in slots_of(optimizer, index).items()
        }
        decays = optimizer._use_weight_decay(variable)
        weights.append(Weight(index, decays, held(variable, part), slots))
    return weights


def _update_rows(
    optimizer: keras.optimizers.Optimizer,
    weights: list[Weight],
    gradients: Sequence[Tensor],
    rows: Sequence[_Rows],
    learning_rate: Any,
) -> None:
    with no_gradient():
        seen = seeing(optimizer, weights)
        values = [weight.value for weight in weights]
        # PyTorch's refuses a list without weights.
        if any(weight.decays for weight in weights):
            seen._apply_weight_decay(values)
        own = [part.of(gradients[part.place]) for part in rows]
        seen._backend_update_step(own, values, learning_rate)
