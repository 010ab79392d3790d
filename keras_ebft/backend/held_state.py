"""A call of a trainer that fails leaves the model as it was before the failing step.

JAX's trainer takes the values out of all variables while it runs, and hands them back
when it ends as expected; here they come back whatever ends it. A graph of TensorFlow's
that is broken off may have assigned some variables and not others.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name, collected_errors
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
    **options: Any,
) -> Callable[..., Any]:
    """A trainer's function of a step, after whose failure the model is whole.

    Args:
        model: `keras.Model`.
        step: one step, function of `(state, batch)` or `(batch)`.
        make_function: makes the function that Keras' trainer calls out of a step.
        runs_python: bool, whether steps call Python (`call_python`).
        **options: for `make_function`.

    Returns:
        A function of the same arguments as that of `make_function`.
    """
    if backend_name() != "jax":
        make = functools.partial(make_function, step, **options)
        function = _PerShape(make) if backend_name() == "tensorflow" else make()
        return functools.partial(_call, function) if runs_python else function
    held = _Held(model, step, runs_python)
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


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    with collected_errors() as errors:
        returned = function(*arguments)
    if errors:
        raise errors[0]
    return returned


class _Held:
    """Keeps hold of the state before and after every step of a call."""

    def __init__(
        self,
        model: keras.Model,
        step: Callable[..., Any],
        runs_python: bool,
    ) -> None:
        self.model = model
        self.step = step
        self.runs_python = runs_python
        self.function: Callable[..., Any] = self.run_step
        self.state: tuple[list[Tensor], ...] = ()

    def __call__(self, state: tuple[list[Tensor], ...], iterator: Any) -> Any:
        self.state = state
        try:
            return self.function(state, iterator)
        except BaseException as error:
            try:
                hand_back(self.model, self.state)
            except RuntimeError as lost:
                raise lost from error
            raise
        finally:
            self.state = ()

    def run_step(self, state: tuple[list[Tensor], ...], batch: Any) -> Any:
        """One step, after which its state is the one that is kept."""
        if not self.runs_python:
            outputs, self.state = self.step(state, batch)
            return outputs, self.state
        return _call(self._whole_step, state, batch)

    def _whole_step(self, state: tuple[list[Tensor], ...], batch: Any) -> Any:
        import jax

        outputs, self.state = self.step(state, batch)
        # Steps run on while Python goes on: errors come with the last of it.
        jax.block_until_ready(self.state)
        return outputs, self.state
