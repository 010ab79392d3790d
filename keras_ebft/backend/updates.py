"""Updates that are not finite are none: everything stays as it was before them."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_ebft.backend.large_updates import (
    in_buckets,
    is_rehearsed,
    rehearsed,
    replaced,
    updates_in_steps,
    without_interruption,
)
from keras_ebft.backend.loops import compiles_every_step
from keras_ebft.backend.replicas import summed_gradients
from keras_ebft.backend.runtime import (
    backend_name,
    dense,
    no_gradient,
    python_failed,
)
from keras_ebft.typing import Tensor

# Elements of a tensor that may be in memory twice during an update, and be copied.
SMALL = 2**18
# Elements that are copied in the time that PyTorch takes to begin an operation.
COPIED_IN_A_CALL = 2**12


@contextlib.contextmanager
def whole_step(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    runs_python: bool,
) -> Iterator[None]:
    """Context of a step: if it fails before its update, nothing of it has happened.

    On JAX, `held_state` does it: the state is no variable there.

    Args:
        optimizer: Keras optimizer that makes the update.
        variables: list of small variables that a step moves beside the update.
        runs_python: bool, whether the step calls Python (`call_python`), whose
            exceptions TensorFlow raises when the step has come to its end.
    """
    with no_gradient():
        before = [(v, ops.copy(v)) for v in (calls_of(optimizer), *variables)]
    try:
        yield
    except BaseException:
        undo_without_update(before)
        raise
    if runs_python:
        undo_without_update(before, python_failed)


def undo_without_update(
    before: Sequence[tuple[keras.Variable, Tensor]],
    failed: Callable[[Tensor], Any] = lambda calls: True,
) -> None:
    """Makes variables what they were before a step that failed and has no update.

    Args:
        before: list of variables and their values, the optimizer's `calls_of` first.
        failed: function of the number of calls, bool or bool scalar tensor.
    """
    if not before:
        return
    (calls, calls_before), *others = before
    with no_gradient():
        calls_now = ops.copy(calls)
        has_none = ops.equal(calls_before, calls_now)
        undone = ops.logical_and(failed(calls_now), has_none)
        for variable, value in others:
            now = ops.convert_to_tensor(variable)
            variable.assign(ops.where(undone, value, now))


def update_if_finite(
    model: keras.Model,
    step: Callable[..., Any],
    state: list[Any],
    record: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> Any:
    """A train step whose update happens whole or not at all.

    Finite must be what the update leads to, weights and optimizer, and not only the
    gradient: a large learning rate or a square overflows later. A step without
    update counts in no metric, but for what `record` does.

    Args:
        model: `keras.Model` with a built optimizer.
        step: Keras' train step, function of `state`'s parts.
        state: list; on JAX the values of all variables, elsewhere empty.
        record: function of a bool scalar, whether there was an update, and of a
            float32 scalar, the norm of all gradients before any clipping; called
            where it may assign the variables of metrics; returns the logs.

    Returns:
        What `step` returns.
    """
    if state:
        return _update_in_state(model, step, state, record)
    optimizer = model.optimizer
    with no_gradient():
        metrics = [ops.copy(variable) for variable in model.metrics_variables]
        calls = ops.copy(calls_of(optimizer))
    norms: list[Tensor] = []
    with replaced(optimizer, apply=_apply_if_finite(optimizer, norms)):
        step()
    # Loss scaling, too, leaves the number as it is where it skips an update.
    updated = ops.not_equal(calls_of(optimizer), calls)
    with no_gradient():
        for variable, before in zip(model.metrics_variables, metrics):
            variable.assign(ops.where(updated, variable, before))
        return record(updated, norms[0])


def _update_in_state(
    model: keras.Model,
    step: Callable[..., Any],
    state: list[Any],
    record: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> Any:
    *_, optimizer_variables, metrics = state[0]
    optimizer = model.optimizer
    norms: list[Tensor] = []
    apply = _stateless_apply_if_finite(optimizer, norms)
    with replaced(optimizer, stateless_apply=apply):
        _, (*new, new_metrics) = step(*state)
    count = next(
        index
        for index, variable in enumerate(optimizer.variables)
        if variable is calls_of(optimizer)
    )
    updated = ops.not_equal(new[-1][count], optimizer_variables[count])
    chosen = [ops.where(updated, *both) for both in zip(new_metrics, metrics)]
    mapping = list(zip(model.metrics_variables, chosen))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        logs = record(updated, norms[0])
    new_metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    return logs, (*new, new_metrics)


def calls_of(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Variable of how many gradients were taken, also where they accumulate."""
    return getattr(optimizer, "inner_optimizer", optimizer)._iterations


def gradient_norm(gradients: Sequence[Any], scale: Any) -> Tensor:
    """Euclidean norm of all gradients together.

    Args:
        gradients: list of float tensors; `None` for variables without one.
        scale: float or scalar tensor that the loss was multiplied by.

    Returns:
        float32 scalar.
    """
    found = [gradient for gradient in gradients if gradient is not None]
    squares = [
        _sum_of_squares(ops.cast(gradient, "float32")) for gradient in _together(found)
    ]
    return ops.divide(ops.sqrt(ops.sum(ops.stack(squares))), scale)


def _sum_of_squares(value: Tensor) -> Tensor:
    if backend_name() == "jax":
        import jax

        # What is sharded XLA would gather for a product. Apart from the squares that
        # optimizers take: if they were one, XLA would keep them in memory for both.
        return ops.sum(ops.square(jax.lax.optimization_barrier(value)))
    # Squares in memory would be a tensor more.
    flat = ops.reshape(value, (-1,))
    return ops.dot(flat, flat)


def _loss_scale(optimizer: keras.optimizers.Optimizer) -> Any:
    """What the loss is multiplied by: a variable, or a number."""
    scale = getattr(optimizer, "dynamic_scale", None)
    return scale if scale is not None else optimizer.loss_scale_factor or 1.0


def _stateless_apply_if_finite(
    optimizer: keras.optimizers.Optimizer, norms: list[Tensor]
) -> Callable[..., Any]:
    import jax

    # Traced once for the two calls below.
    apply = jax.jit(optimizer.stateless_apply)

    def apply_if_finite(
        optimizer_variables: list[Tensor],
        grads: list[Tensor],
        trainable_variables: list[Tensor],
    ) -> Any:
        scale = _loss_scale(optimizer)
        if isinstance(scale, keras.Variable):
            values = zip(optimizer.variables, optimizer_variables)
            scale = next(value for variable, value in values if variable is scale)
        grads = _laid_out_as_weights(grads)
        norms.append(gradient_norm(grads, scale))
        arguments = optimizer_variables, grads, trainable_variables
        new = apply(*arguments)

        def update() -> Any:
            # Large ones are computed again: chosen from at the end, old and new
            # values would be in memory at once.
            if all(_is_small(value) for part in new for value in part):
                return new
            again = apply(*arguments)
            return tuple(map(_smaller_of, new, again))

        return ops.cond(
            _all_finite([value for part in new for value in part]),
            update,
            lambda: (list(trainable_variables), list(optimizer_variables)),
        )

    return apply_if_finite


def _laid_out_as_weights(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the order of their rows, where JAX's processor is a CPU.

    That of a head is transposed by what makes it. XLA would keep it so for one of its
    readers and copy it for another, and hold both.
    """
    import jax
    from jax.experimental.layout import Layout, with_layout_constraint

    if jax.default_backend() != "cpu":
        return list(gradients)
    return [
        with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))
        for gradient in gradients
    ]


def _is_small(value: Any) -> bool:
    return math.prod(value.shape) <= SMALL


def _smaller_of(kept: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    """What is small of the first, what is large of the second."""
    return [a if _is_small(a) else b for a, b in zip(kept, again)]


def _apply_if_finite(
    optimizer: keras.optimizers.Optimizer, norms: list[Tensor]
) -> Callable[..., None]:
    apply = optimizer.apply

    def apply_if_finite(
        grads: Sequence[Tensor], trainable_variables: Any = None
    ) -> None:
        if trainable_variables is None:
            trainable_variables = optimizer._trainable_variables
        with no_gradient():
            # With rows that are there twice, squares and norms are not those of sums.
            whole = [
                None if gradient is None else dense(gradient) for gradient in grads
            ]
            # Of the whole batch: all replicas decide alike whether it is finite.
            grads = summed_gradients(whole)
            norms.append(gradient_norm(grads, _loss_scale(optimizer)))
        changed = [*trainable_variables, *optimizer.variables]
        methods: dict[str, Callable[..., Any]] = {}
        has_large = not all(map(_is_small, changed))
        if has_large and updates_in_steps(optimizer, trainable_variables):
            if is_rehearsed(optimizer, trainable_variables):
                _apply_rehearsed(optimizer, apply, grads, trainable_variables)
                return
            methods = in_buckets(optimizer)
        with _undone_if_it_fails(changed) as undo:
            with replaced(optimizer, **methods):
                apply(grads, trainable_variables)
            ops.cond(_all_finite(changed), lambda: None, undo)

    return apply_if_finite


def _apply_rehearsed(
    optimizer: keras.optimizers.Optimizer,
    apply: Callable[..., None],
    grads: Sequence[Tensor],
    trainable_variables: Sequence[keras.Variable],
) -> None:
    """Copies no weight and no slot; an interruption waits until all is done."""
    counters = [v for v in optimizer.variables if len(v.shape) == 0]
    methods, made = rehearsed(optimizer, _all_finite)
    with (
        without_interruption(),
        _undone_if_it_fails(counters) as undo,
        replaced(optimizer, **methods),
    ):
        apply(grads, trainable_variables)
        ops.cond(made[0], lambda: None, undo)


@contextlib.contextmanager
def _undone_if_it_fails(
    variables: Sequence[keras.Variable],
) -> Iterator[Callable[[], None]]:
    """Context with a function that makes variables what they were.

    It is called if there is an exception: an interruption by the user, for example,
    between two weights.
    """
    before = [ops.copy(variable) for variable in variables]

    def undo() -> None:
        for variable, value in zip(variables, before):
            variable.assign(value)

    try:
        yield undo
    except BaseException:
        undo()
        raise


def check_finite(variables: Sequence[keras.Variable], path: Any) -> None:
    """Raises a `FloatingPointError` unless what is to be written is finite.

    Args:
        variables: list of Keras variables.
        path: where they are to be written, for the message.
    """
    if bool(_all_finite(variables)):
        return
    for variable in variables:
        if not bool(_all_finite([variable])):
            raise FloatingPointError(
                f"Expected finite values to write to {path}. Received: NaN or "
                f"infinity in '{variable.path}', so nothing was written. Go back to "
                "the last file, and train with a lower learning rate."
            )


def _all_finite(values: Sequence[Any]) -> Tensor:
    floats = [
        ops.convert_to_tensor(value)
        for value in values
        if "float" in keras.backend.standardize_dtype(value.dtype)
    ]
    floats = _together(floats)
    if not floats:
        return ops.convert_to_tensor(True)

    def each() -> Tensor:
        alike: dict[Any, list[Tensor]] = {}
        for value in floats:
            alike.setdefault(_kept_alike(value), []).append(value)
        return ops.all(ops.stack(list(map(_all_finite_of, alike.values()))))

    if compiles_every_step():
        return each()
    # Op by op every number would be looked at four times, but what is not finite leaves
    # no sum finite. A sum can overflow by itself: then it takes a closer look.
    sums = [ops.cast(ops.sum(value), "float32") for value in floats]
    return ops.cond(
        ops.isfinite(ops.sum(ops.stack(sums))),
        lambda: ops.convert_to_tensor(True),
        each,
    )


def _all_finite_of(alike: list[Tensor]) -> Tensor:
    """The same of tensors of one shape, looked at together.

    So XLA has none of them in memory that it computed for this alone. On JAX no bools
    either: numbers less themselves are 0, or not a number. (Times 0 as well, but XLA
    would hold a tensor of zeros for it. Their largest would not do: XLA's maxima along
    a vector lose what is not a number.)
    """
    if backend_name() == "jax":
        zeros = (ops.subtract(value, value) for value in alike)
        return ops.isfinite(ops.sum(functools.reduce(ops.add, zeros)))
    finite = functools.reduce(ops.logical_and, map(ops.isfinite, alike))
    return ops.all(finite)


def _kept_alike(value: Tensor) -> Any:
    """What tensors have in common that can be combined where they are."""
    if keras.distribution.distribution() is not None:
        return id(value)
    return tuple(value.shape)


def _together(values: list[Tensor]) -> list[Tensor]:
    """Small tensors as one of each dtype: adapters have hundreds, a program each.

    Op by op it is a call each, which costs as much as copying few numbers.
    """
    limit = SMALL if compiles_every_step() else COPIED_IN_A_CALL
    if keras.distribution.distribution() is not None:
        # Parts of them would have to be sent from device to device.
        return values
    small: dict[str, list[Tensor]] = {}
    large = []
    for value in values:
        if math.prod(value.shape) <= limit:
            dtype = keras.backend.standardize_dtype(value.dtype)
            small.setdefault(dtype, []).append(ops.reshape(value, (-1,)))
        else:
            large.append(value)
    return [*map(ops.concatenate, small.values()), *large]
