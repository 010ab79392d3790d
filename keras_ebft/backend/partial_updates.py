"""Updates of weights by parts, which need no memory beside weights and slots.

Most optimizers change every number of a weight by its own gradient and its own slots
alone. Op by op such an update is computed for some rows at a time, few enough to stay
in a processor's cache; in a graph, by one program for all weights of a shape, which XLA
compiles for large ones, so that nothing is kept between reading and writing.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_ebft.backend.device import device_of
from keras_ebft.backend.loops import compiles_every_step
from keras_ebft.backend.runtime import after, backend_name, dense, no_gradient
from keras_ebft.typing import Tensor

# By these a number of a weight depends on no other number of it.
ELEMENTWISE = (
    keras.optimizers.Adadelta,
    keras.optimizers.Adagrad,
    keras.optimizers.Adam,
    keras.optimizers.Adamax,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
    keras.optimizers.RMSprop,
    keras.optimizers.SGD,
)
# Elements of the rows that are updated together: a processor's cache holds them, their
# gradient and slots; an accelerator has many cores to keep busy.
CACHED = {"cpu": 2**18}
ON_ACCELERATORS = 2**22
# Elements of a weight for which a program of XLA's own is worth being compiled.
LARGE = 2**16

AllFinite = Callable[[Sequence[Any]], Tensor]
Update = Callable[[Sequence[Tensor], Sequence[keras.Variable], Any], Any]


def updates_by_parts(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether parts of a weight can be updated one after the other, on one device.

    Args:
        optimizer: Keras optimizer whose weights change by `update_step` and weight
            decay alone.
    """
    kind = type(optimizer)
    return (
        # A user's own may do more between one weight and the next.
        kind.__module__.startswith("keras.src.")
        and kind.update_step in {known.update_step for known in ELEMENTWISE}
        and keras.distribution.distribution() is None
        and not _is_replicated()
    )


def _is_replicated() -> bool:
    if backend_name() != "tensorflow":
        return False
    import tensorflow as tf

    return bool(tf.distribute.has_strategy())


def rehearsal_and_update(
    optimizer: keras.optimizers.Optimizer, all_finite: AllFinite
) -> tuple[Update, Update]:
    """Two functions of gradients, their weights and the learning rate.

    Args:
        optimizer: one that `updates_by_parts`.
        all_finite: function of a list of tensors that returns a bool scalar.

    Returns:
        `(rehearse, update)`: the first changes nothing and returns a bool scalar,
        whether what the second leads to is finite, weights and slots.
    """
    if backend_name() == "torch":
        return _of_rows(optimizer, all_finite)
    return _of_weights(optimizer, all_finite)


class _Held(keras.Variable):
    """Numbers of a weight or of a slot, as its optimizer sees them."""

    def __init__(self, value: Tensor) -> None:
        # Keras' own would give it memory and a place among a layer's variables.
        self._value = value
        self._shape = tuple(value.shape)
        self._dtype = keras.backend.standardize_dtype(value.dtype)
        self._autocast = False

    def _direct_assign(self, value: Tensor) -> None:
        if backend_name() == "torch":
            # Into the memory it was made with, a weight's own perhaps.
            super()._direct_assign(value)
        else:
            self._value = value


class _Weight(NamedTuple):
    """Numbers of one weight, those of its slots, and what its optimizer knows of it."""

    index: int
    decays: bool
    value: _Held
    slots: dict[str, _Held]

    def held(self) -> list[_Held]:
        return [self.value, *self.slots.values()]


def _slots_of(
    optimizer: keras.optimizers.Optimizer, index: int
) -> dict[str, keras.Variable]:
    """An optimizer's slots of one weight, by the name of the list they are in."""
    return {
        name: slots[index]
        for name, slots in vars(optimizer).items()
        if isinstance(slots, list)
        and name not in ("_variables", "_trainable_variables")
        and index < len(slots)
        and isinstance(slots[index], keras.Variable)
    }


def _seeing(optimizer: Any, weights: Sequence[_Weight]) -> Any:
    """The same optimizer, for which there is nothing but these weights."""
    seeing = object.__new__(type(optimizer))
    known = {id(weight.value): weight for weight in weights}
    slots: dict[str, dict[int, _Held]] = {}
    for weight in weights:
        for name, slot in weight.slots.items():
            slots.setdefault(name, {})[weight.index] = slot
    methods = {
        "_get_variable_index": lambda variable: known[id(variable)].index,
        "_use_weight_decay": lambda variable: known[id(variable)].decays,
    }
    # Methods that are replaced belong to the optimizer of the whole weights.
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _REPLACED_FOR_UPDATES
    }
    # Past the trackers of Keras and TensorFlow.
    vars(seeing).update({**own, **slots, **methods})
    return seeing


_REPLACED_FOR_UPDATES = ("apply", "_apply_weight_decay", "_backend_update_step")


# --- Op by op, on PyTorch: some rows at a time.


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


def _of_rows(
    optimizer: keras.optimizers.Optimizer, all_finite: AllFinite
) -> tuple[Update, Update]:
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
) -> list[_Weight]:
    def held(variable: keras.Variable, part: _Rows) -> _Held:
        value = part.of(variable.value)
        return _Held(keras.ops.copy(value) if copied else value)

    weights = []
    for part in rows:
        variable = variables[part.place]
        index = optimizer._get_variable_index(variable)
        slots = {
            name: held(slot, part) for name, slot in _slots_of(optimizer, index).items()
        }
        decays = optimizer._use_weight_decay(variable)
        weights.append(_Weight(index, decays, held(variable, part), slots))
    return weights


def _update_rows(
    optimizer: keras.optimizers.Optimizer,
    weights: list[_Weight],
    gradients: Sequence[Tensor],
    rows: Sequence[_Rows],
    learning_rate: Any,
) -> None:
    with no_gradient():
        seeing = _seeing(optimizer, weights)
        values = [weight.value for weight in weights]
        # PyTorch's refuses a list without weights.
        if any(weight.decays for weight in weights):
            seeing._apply_weight_decay(values)
        own = [part.of(gradients[part.place]) for part in rows]
        seeing._backend_update_step(own, values, learning_rate)


# --- In a graph of TensorFlow: one program for all weights of a shape.


def _of_weights(
    optimizer: keras.optimizers.Optimizer, all_finite: AllFinite
) -> tuple[Update, Update]:
    def is_finite(*arguments: Any) -> Tensor:
        values = map(keras.ops.isfinite, _computed(optimizer, *arguments))
        # Looked at together, none of them has to be in memory.
        return keras.ops.all(functools.reduce(keras.ops.logical_and, values))

    def assign(gradient: Any, rate: Any, decays: bool, names: Any, *own: Any) -> Tensor:
        computed = _computed(optimizer, gradient, rate, decays, names, *own)
        for variable, value in zip(own, computed):
            variable.assign(value)
        return keras.ops.convert_to_tensor(True)

    def one_by_one(program: Callable[..., Tensor]) -> Update:
        programs = {large: _program(program, large) for large in (False, True)}

        def function(gradients: Any, variables: Any, learning_rate: Any) -> Tensor:
            found = all_finite([])
            rate = dense(learning_rate)
            for gradient, variable in zip(gradients, variables):
                index = optimizer._get_variable_index(variable)
                decays = optimizer._use_weight_decay(variable)
                slots = _slots_of(optimizer, index)
                own = [part.value for part in (variable, *slots.values())]
                large = math.prod(variable.shape) >= LARGE
                # Memory holds what one of them computes, not all.
                with after(found):
                    result = programs[large](
                        dense(gradient), rate, decays, tuple(slots), *own
                    )
                    found = keras.ops.logical_and(found, result)
            return found

        return function

    return one_by_one(is_finite), one_by_one(assign)


def _computed(
    optimizer: keras.optimizers.Optimizer,
    gradient: Tensor,
    learning_rate: Tensor,
    decays: bool,
    names: tuple[str, ...],
    *values: Any,
) -> list[Tensor]:
    """What a weight and its slots become; nothing is assigned."""
    value, *slots = (_Held(dense(value)) for value in values)
    weight = _Weight(0, decays, value, dict(zip(names, slots)))
    seeing = _seeing(optimizer, [weight])
    # TensorFlow's own assign to its variables, past all else.
    for name in ("assign", "assign_add", "assign_sub"):
        vars(seeing)[name] = getattr(BaseOptimizer, name).__get__(seeing)
    BaseOptimizer._apply_weight_decay(seeing, [value])
    seeing.update_step(gradient, value, learning_rate)
    return [held.value for held in weight.held()]


def _program(function: Callable[..., Tensor], large: bool) -> Callable[..., Tensor]:
    """A function that is traced once for all weights of a shape."""
    if not compiles_every_step():
        return function
    import tensorflow as tf

    return tf.function(
        function,
        autograph=False,
        # None, within what XLA compiles: as all of that is.
        jit_compile=True if large and _has_xla() else None,
        experimental_attributes={"_noinline": True},
    )


@functools.cache
def _has_xla() -> bool:
    """Whether XLA compiles for this machine; there are builds without."""
    import tensorflow as tf

    with tf.init_scope():
        try:
            tf.function(lambda x: x + 1.0, jit_compile=True)(tf.constant(1.0))
        except tf.errors.OpError:
            return False
    return True
