"""Updates by one program for all weights of a shape, for TensorFlow.

A graph has a call of it for each weight, in place of all of its operations. XLA
compiles those of large weights: nothing is in memory between reading and writing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_ebft.backend.loops import compiles_every_step
from keras_ebft.backend.runtime import after, dense
from keras_ebft.backend.seen_weights import Held, Weight, seeing, slots_of
from keras_ebft.typing import Tensor

# Elements of a weight for which a program of XLA's own is worth being compiled.
LARGE = 2**16


def by_programs(
    optimizer: keras.optimizers.Optimizer, all_finite: Callable[[Sequence[Any]], Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`partial_updates.rehearsal_and_update`, one weight after the other."""

    def is_finite(*arguments: Any) -> Tensor:
        values = map(keras.ops.isfinite, _computed(optimizer, *arguments))
        # Looked at together, none of them has to be in memory.
        return keras.ops.all(functools.reduce(keras.ops.logical_and, values))

    def assign(gradient: Any, rate: Any, decays: bool, names: Any, *own: Any) -> Tensor:
        computed = _computed(optimizer, gradient, rate, decays, names, *own)
        for variable, value in zip(own, computed):
            variable.assign(value)
        return keras.ops.convert_to_tensor(True)

    def one_by_one(program: Callable[..., Tensor]) -> Callable[..., Tensor]:
        programs = {large: _program(program, large) for large in (False, True)}

        def function(gradients: Any, variables: Any, learning_rate: Any) -> Tensor:
            found = all_finite([])
            rate = dense(learning_rate)
            for gradient, variable in zip(gradients, variables):
                index = optimizer._get_variable_index(variable)
                decays = optimizer._use_weight_decay(variable)
                slots = slots_of(optimizer, index)
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
    value, *slots = (Held(dense(value)) for value in values)
    weight = Weight(0, decays, value, dict(zip(names, slots)))
    seen = seeing(optimizer, [weight])
    # TensorFlow's own assign to its variables, past all else.
    for name in ("assign", "assign_add", "assign_sub"):
        vars(seen)[name] = getattr(BaseOptimizer, name).__get__(seen)
    BaseOptimizer._apply_weight_decay(seen, [value])
    seen.update_step(gradient, value, learning_rate)
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
