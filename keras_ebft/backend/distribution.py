"""Several devices: what does not run on them is refused before anything is computed."""

import contextlib
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name

GUIDE = "See docs/distribution.md."
LEAVE_THE_SCOPE = (
    "Leave the scope: processes that call tf.distribute.MultiWorkerMirroredStrategy() "
    "before anything else train together, each with one device."
)


def refuse_silent_distribution() -> None:
    """Raises where training would go on without an error, and be wrong.

    Keras accepts a `keras.distribution` on TensorFlow and PyTorch and ignores it; in
    the scope of a strategy of TensorFlow's replicas draw the same numbers and sum their
    gradients; processes that know nothing of one another train apart.

    Raises:
        ValueError: for any of these.
    """
    found = _FINDERS[backend_name()]()
    if found is not None:
        received, remedy = found
        raise ValueError(
            "Expected one device, or several that train one model together, with the "
            f"{backend_name()} backend. Received: {received}. {remedy} {GUIDE}"
        )


def refuse_handed_over(causal_lm: Any) -> None:
    """Raises for a model whose weights a backend's own distribution takes care of.

    Args:
        causal_lm: `CausalLM`, or what else a user took for one.

    Raises:
        ValueError: if one does.
    """
    if backend_name() == "tensorflow":
        refuse_mirrored(getattr(causal_lm, "variables", ()), "a causal_lm")
    if backend_name() == "torch":
        _refuse_sharded(causal_lm)


def _refuse_sharded(causal_lm: Any) -> None:
    """Raises for a model, or layers of it, that `fully_shard` was called with.

    It finds no parameters in them: Keras' layers keep theirs elsewhere. So every
    process would go on holding all of them.
    """
    from torch.distributed.fsdp import FSDPModule

    backbone = getattr(causal_lm, "backbone", None)
    for layer in (causal_lm, backbone, *getattr(backbone, "layers", ())):
        if isinstance(layer, FSDPModule):
            raise ValueError(
                "Expected layers that every process holds as a whole, with the torch "
                f"backend. Received: '{layer.name}' after fully_shard, which finds "
                "no parameters in Keras' layers and shares out none. Leave it out: "
                "low-rank adapters and `rematerialize` save memory, and on the JAX "
                f"backend ModelParallel shares weights out. {GUIDE}"
            )


def refuse_mirrored(variables: Sequence[keras.Variable], made: str) -> None:
    """Raises for variables that a strategy of TensorFlow's takes care of.

    Keras' optimizer updates them within the strategy alone.

    Args:
        variables: list of Keras variables.
        made: str, what was made with them.

    Raises:
        ValueError: if there is one.
    """
    if backend_name() != "tensorflow":
        return
    import tensorflow as tf

    for variable in variables:
        if isinstance(variable.value, tf.distribute.DistributedValues):
            raise ValueError(
                f"Expected {made} outside of the scope of a tf.distribute strategy. "
                f"Received: '{variable.path}', which was made within one. "
                f"{LEAVE_THE_SCOPE} {GUIDE}"
            )


class _Following:
    """A distribution that knows variables in a scope by their names outside of it."""

    def __init__(self, distribution: Any, scope: str) -> None:
        self._distribution = distribution
        self._scope = f"{scope}/"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._distribution, name)

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        path = variable.path.removeprefix(self._scope)
        known = types.SimpleNamespace(path=path, shape=variable.shape)
        return self._distribution.get_variable_layout(known)


@contextlib.contextmanager
def layouts_without(scope: str) -> Iterator[None]:
    """Context in which a copy is laid out over the devices as its original.

    Args:
        scope: str, the name scope that the copy is made in, and the original was not.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or backend_name() != "jax":
        yield
        return
    keras.distribution.set_distribution(_Following(distribution, scope))
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


Found = tuple[str, str] | None


def _ignored() -> Found:
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    name = type(distribution).__name__
    remedy = "Use the JAX backend."
    if backend_name() == "torch":
        remedy = "Use torchrun and torch.distributed, or the JAX backend."
    if backend_name() == "tensorflow":
        remedy = (
            "Use processes with a tf.distribute.MultiWorkerMirroredStrategy, or the "
            "JAX backend."
        )
    return f"a keras.distribution.{name}, which it ignores", remedy


def _on_tensorflow() -> Found:
    import tensorflow as tf

    from keras_ebft.backend import tensorflow_processes as processes

    if tf.distribute.has_strategy():
        strategy = tf.distribute.get_strategy()
        if not isinstance(strategy, tf.distribute.OneDeviceStrategy):
            name = type(strategy).__name__
            return f"the scope of a tf.distribute.{name}", LEAVE_THE_SCOPE
    known = len(processes.tasks_of_cluster())
    expected = processes.expected_processes()
    if expected > 1 and known <= 1:
        return (
            f"one of {expected} processes of TF_CONFIG that do not know each other, "
            "which would train alone",
            "Call tf.distribute.MultiWorkerMirroredStrategy() before anything else.",
        )
    devices = processes.accelerators_of_process()
    if known > 1 and devices > 1:
        return (
            f"one of {known} processes with {devices} accelerators, of which it would "
            "use one",
            "Start a process for each, and show it that one alone "
            "(CUDA_VISIBLE_DEVICES).",
        )
    return _ignored()


def _on_torch() -> Found:
    import torch

    parallel = torch.distributed
    grouped = parallel.is_available() and parallel.is_initialized()
    # What torchrun says to the processes that it starts.
    started = "TORCHELASTIC_RUN_ID" in os.environ
    processes = int(os.environ.get("WORLD_SIZE", "1")) if started else 1
    if processes > 1 and not grouped:
        return (
            f"one of {processes} processes of torchrun without a group, which would "
            "train alone",
            "Call torch.distributed.init_process_group() before the model is made.",
        )
    return _ignored()


def _on_jax() -> Found:
    import jax

    distribution = keras.distribution.distribution()
    if jax.process_count() == 1:
        return None
    if isinstance(distribution, keras.distribution.ModelParallel):
        return (
            f"a ModelParallel over {jax.process_count()} processes, whose weights no "
            "process could copy or write",
            "Use the devices of one process, or DataParallel.",
        )
    if distribution is None:
        return (
            f"one of {jax.process_count()} processes without a keras.distribution, "
            "which would train alone",
            "Call keras.distribution.set_distribution(keras.distribution."
            "DataParallel()) before the model is made.",
        )
    return None


_FINDERS: dict[str, Callable[[], Found]] = {
    "jax": _on_jax,
    "tensorflow": _on_tensorflow,
    "torch": _on_torch,
}
