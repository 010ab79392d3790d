"""Updates of large weights, whole or not at all.

Every weight's update is computed, looked at and forgotten before any is made, by parts
where the optimizer allows it (`partial_updates`). One that has to see all of a weight
keeps copies of everything that it changes where memory is cheaper than computing twice,
and updates a few weights at a time.
"""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_ebft.backend.device import device_of
from keras_ebft.backend.partial_updates import rehearsal_and_update, updates_by_parts
from keras_ebft.backend.runtime import after, dense, no_gradient
from keras_ebft.typing import Tensor

# Elements of weights that are updated in one call. Keras' optimizers on PyTorch hold
# four more numbers for each: fewer take less time, too (docs/benchmarks.md).
BUCKET = 2**20


def updates_in_steps(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> bool:
    """Whether weights change by an optimizer's `update_step` and weight decay alone.

    Args:
        optimizer: Keras optimizer.
        variables: list of Keras variables that it updates.
    """
    return (
        # Others have an optimizer within them, which they call as they like.
        type(optimizer).apply is BaseOptimizer.apply
        and not optimizer.gradient_accumulation_steps
        and not optimizer.use_ema
        and all(variable.constraint is None for variable in variables)
        and not any(variable.overwrite_with_gradient for variable in variables)
    )


def is_rehearsed(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> bool:
    """Whether an update is better computed twice than undone from copies.

    By parts it takes less time than copies do; otherwise more, and where memory is
    dear copies cost more than that.

    Args:
        optimizer: one that `updates_in_steps`.
        variables: list of Keras variables that it updates.
    """
    return updates_by_parts(optimizer) or device_of(variables[0]).platform != "cpu"


def in_buckets(optimizer: keras.optimizers.Optimizer) -> dict[str, Callable[..., Any]]:
    """Methods of an optimizer by name, with which it updates a few weights at a time.

    Args:
        optimizer: one that `updates_in_steps`.
    """
    decay, update = optimizer._apply_weight_decay, optimizer._backend_update_step

    def update_in_buckets(grads: Any, variables: Any, learning_rate: Any) -> None:
        for places in buckets(variables):
            own = [variables[place] for place in places]
            # PyTorch's refuses a list without weights.
            if any(map(optimizer._use_weight_decay, own)):
                decay(own)
            update([grads[place] for place in places], own, learning_rate)

    return {
        # With the update that it belongs to.
        "_apply_weight_decay": lambda variables: None,
        "_backend_update_step": update_in_buckets,
    }


def rehearsed(
    optimizer: keras.optimizers.Optimizer,
    all_finite: Callable[[Sequence[Any]], Tensor],
) -> tuple[dict[str, Callable[..., Any]], list[Tensor]]:
    """Methods like those of `in_buckets`, which update nothing unless all is finite.

    Args:
        optimizer: one that `updates_in_steps`.
        all_finite: function of a list of tensors that returns a bool scalar.

    Returns:
        `(methods, made)`: methods by name, and a list that gets one bool scalar when
        they have run, whether there was an update.
    """
    if updates_by_parts(optimizer):
        rehearse, update = rehearsal_and_update(optimizer, all_finite)
    else:
        rehearse, update = _of_whole_weights(optimizer, all_finite)
    made: list[Tensor] = []

    def update_if_finite(grads: Any, variables: Any, learning_rate: Any) -> None:
        with no_gradient():
            found = rehearse(grads, variables, learning_rate)
        made.append(found)

        def make() -> None:
            with _saying_what_is_lost():
                update(grads, variables, learning_rate)

        ops.cond(found, make, lambda: None)

    methods: dict[str, Callable[..., Any]] = {
        # With the update that it belongs to.
        "_apply_weight_decay": lambda variables: None,
        "_backend_update_step": update_if_finite,
    }
    return methods, made


def _of_whole_weights(
    optimizer: keras.optimizers.Optimizer,
    all_finite: Callable[[Sequence[Any]], Tensor],
) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """`rehearsal_and_update` for optimizers that have to see all of a weight."""

    def rehearse_one(gradient: Any, variable: Any, learning_rate: Any) -> Tensor:
        with _seen_by_scopes(optimizer, variable), keras.StatelessScope() as scope:
            BaseOptimizer._apply_weight_decay(optimizer, [variable])
            optimizer.update_step(dense(gradient), variable, learning_rate)
        return all_finite(list(scope.state_mapping.values()))

    def rehearse(grads: Any, variables: Any, learning_rate: Any) -> Tensor:
        found = all_finite([])
        for gradient, variable in zip(grads, variables):
            # One after the other on TensorFlow, too.
            with after(found):
                finite = rehearse_one(gradient, variable, learning_rate)
                found = ops.logical_and(found, finite)
        return found

    return rehearse, in_buckets(optimizer)["_backend_update_step"]


def buckets(variables: Sequence[keras.Variable]) -> Iterator[list[int]]:
    """Places of variables that follow one another and are few enough together.

    Args:
        variables: list of Keras variables.

    Yields:
        lists of ints, of one place at least.
    """
    places: list[int] = []
    elements = 0
    for place, variable in enumerate(variables):
        size = math.prod(variable.shape)
        if places and elements + size > BUCKET:
            yield places
            places, elements = [], 0
        places.append(place)
        elements += size
    if places:
        yield places


@contextlib.contextmanager
def replaced(
    optimizer: keras.optimizers.Optimizer, **methods: Callable[..., Any]
) -> Iterator[None]:
    """Context in which an optimizer has other methods."""
    for name, method in methods.items():
        # Past the trackers of Keras, which would keep it.
        object.__setattr__(optimizer, name, method)
    try:
        yield
    finally:
        for name in methods:
            object.__delattr__(optimizer, name)


@contextlib.contextmanager
def _seen_by_scopes(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable
) -> Iterator[None]:
    """Context in which an optimizer updates one variable as a `StatelessScope` sees it.

    TensorFlow's assigns past scopes, and knows variables by what is in them.
    """
    index = optimizer._get_variable_index(variable)
    methods = {
        name: getattr(BaseOptimizer, name).__get__(optimizer)
        for name in ("assign", "assign_add", "assign_sub")
    }
    methods["_get_variable_index"] = lambda variable: index
    with replaced(optimizer, **methods):
        yield


@contextlib.contextmanager
def _saying_what_is_lost() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            "Expected the update of the weights to end: it has been rehearsed. "
            f"Received: {type(error).__name__}: {error}, in the middle of it, so some "
            "weights are updated and others are not. Build the model again and resume "
            "from a TrainingCheckpoint; smaller batches or `micro_batches` need less "
            "memory."
        ) from error


@contextlib.contextmanager
def without_interruption() -> Iterator[None]:
    """Context that a user's interruption (SIGINT) waits for."""
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread has handlers; one that is not Python's cannot be put back.
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)
