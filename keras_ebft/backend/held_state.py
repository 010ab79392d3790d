"""A call of a trainer that fails leaves the model as it was before the failing step.

JAX's trainer takes the values out of all variables while it runs, and hands them back
when it ends as expected; here they come back whatever ends it. A graph of TensorFlow's
that is broken off may have assigned some variables and not others; here it is not: what
Python code within it raises, data too, is raised at its end.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name, raising_collected
from keras_ebft.backend.updates import calls_of, undo_without_update
from keras_ebft.typing import Tensor

# The parts of the state that train, test and predict functions are given.
PARTS = {
    4: ("trainable", "non_trainable", "optimizer", "metrics"),
    3: ("trainable", "non_trainable", "metrics"),
    2: ("trainable", "non_trainable"),
}


def hand_back(model: keras.Model, state: tuple[list[Tensor], ...]) -> None:
    """Assigns the values that a trainer holds to the variables they belong to.

    Args:
        model: `keras.Model`.
        state: tuple of lists of tensors, as the trainer gives it to its functions;
            empty where the values stay in the variables.

    Raises:
        RuntimeError: if the values are gone, because the device failed in the middle
            of a step to which their memory was handed over.
    """
    if not state:
        return
    names = [f"{part}_variables" for part in PARTS[len(state)]]
    parts = dict(zip(names, state))
    if any(value.is_deleted() for part in state for value in part):
        raise RuntimeError(
            "Expected the step to end, or to fail before it began: it computes in "
            "the memory of the weights. Received: a failure of the device in the "
            "middle of a step, so the model's weights are lost. Build the model "
            "again and resume from a TrainingCheckpoint; smaller batches or "
            "`micro_batches` need less memory."
        )
    # Keras' own way to do it; what it would do with these at the end is done.
    model._jax_state, model._jax_state_synced = parts, False
    model.jax_state_sync()
    model._jax_state = None


def holding_state(
    model: keras.Model,
    step: Callable[..., Any],
    make_function: Callable[..., Callable[..., Any]],
    runs_python: bool,
    moved: Sequence[keras.Variable],
    **options: Any,
) -> Callable[..., Any]:
    """A trainer's function of a step, after whose failure the model is whole.

    Args:
        model: `keras.Model`.
        step: one step, function of `(state, batch)` or `(batch)`.
        make_function: makes the function that Keras' trainer calls out of a step.
        runs_python: bool, whether steps call Python (`call_python`).
        moved: list of small variables that a train step moves beside its update.
        **options: for `make_function`.

    Returns:
        A function of the same arguments as that of `make_function`.
    """
    if backend_name() == "tensorflow":
        make = functools.partial(make_function, step, **options)
        return functools.partial(raising_collected, _PerShape(make))
    if backend_name() != "jax":
        return make_function(step, **options)
    held = _Held(model, step, runs_python, moved)
    held.function = make_function(held.run_step, **options)
    return held


class _PerShape:
    """A function for every shape of batches.

    Keras lets TensorFlow trace a second shape as one that is not known, which no step
    can be traced with.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self.make = make
        self.functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, iterator: Any) -> Any:
        shapes = repr(getattr(iterator, "element_spec", None))
        if shapes not in self.functions:
            self.functions[shapes] = self.make()
        return self.functions[shapes](iterator)


class _Held:
    """Keeps hold of the state before and after every step of a call."""

    def __init__(
        self,
        model: keras.Model,
        step: Callable[..., Any],
        runs_python: bool,
        moved: Sequence[keras.Variable],
    ) -> None:
        self.model = model
        self.step = step
        self.runs_python = runs_python
        self.moved = moved
        self.function: Callable[..., Any] = self.run_step
        self.state: tuple[list[Tensor], ...] = ()
        # Of a step whose Python code has not come to its end.
        self.before: list[tuple[keras.Variable, Tensor]] = []

    def __call__(self, state: tuple[list[Tensor], ...], iterator: Any) -> Any:
        self.state = state
        try:
            return self.function(state, iterator)
        except BaseException as error:
            try:
                hand_back(self.model, self.state)
            except RuntimeError as lost:
                raise lost from error
            undo_without_update(self.before)
            raise
        finally:
            self.state, self.before = (), []

    def run_step(self, state: tuple[list[Tensor], ...], batch: Any) -> Any:
        """One step, after which its state is the one that is kept."""
        if not self.runs_python:
            outputs, self.state = self.step(state, batch)
            return outputs, self.state
        self.before = self._copies(state)
        returned = raising_collected(self._whole_step, state, batch)
        self.before = []
        return returned

    def _copies(
        self, state: tuple[list[Tensor], ...]
    ) -> list[tuple[keras.Variable, Tensor]]:
        """What a train step moves, and its values: their memory is handed over."""
        import jax

        if len(state) != len(PARTS[4]):
            return []
        calls = calls_of(self.model.optimizer)
        wanted = {id(variable) for variable in (calls, *self.moved)}
        kinds = (
            self.model.non_trainable_variables,
            self.model.optimizer.variables,
            self.model.metrics_variables,
        )
        found = {
            id(variable): (variable, jax.numpy.copy(value))
            for variables, values in zip(kinds, state[1:])
            for variable, value in zip(variables, values)
            if id(variable) in wanted
        }
        return [found[id(variable)] for variable in (calls, *self.moved)]

    def _whole_step(self, state: tuple[list[Tensor], ...], batch: Any) -> Any:
        import jax

        outputs, self.state = self.step(state, batch)
        # Steps run on while Python goes on: errors come with the last of it.
        jax.block_until_ready(self.state)
        return outputs, self.state
