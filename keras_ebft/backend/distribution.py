"""Several devices: what does not run on them is refused before anything is computed."""

from typing import Any

import keras

from keras_ebft.backend.runtime import backend_name

REMEDY = "Use one device, or keras.distribution on the JAX backend."


def refuse_silent_distribution() -> None:
    """Raises where training would go on without an error, and be wrong.

    Keras accepts a `keras.distribution` on TensorFlow and PyTorch and ignores it;
    replicas of TensorFlow's strategies draw the same numbers and sum their gradients;
    processes of `torch.distributed` would train apart.

    Raises:
        ValueError: for any of these.
    """
    found = _FINDERS.get(backend_name(), lambda: None)()
    if found is not None:
        raise ValueError(
            f"Expected training on one device with the {backend_name()} backend. "
            f"Received: {found}. {REMEDY}"
        )


def check_batch_divides(batch_size: int) -> None:
    """Raises where a batch cannot be shared out between the devices.

    Args:
        batch_size: int, rows of a batch in this process.

    Raises:
        ValueError: if the devices of a `keras.distribution` do not divide it.
    """
    distribution: Any = keras.distribution.distribution()
    if distribution is None or backend_name() != "jax":
        return
    import jax

    mesh = distribution.device_mesh
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    devices = int(sizes.get(distribution.batch_dim_name, 1))
    total = batch_size * jax.process_count()
    if total % devices:
        raise ValueError(
            f"Expected batches that {devices} devices share evenly, because of a "
            f"keras.distribution.{type(distribution).__name__}. Received: batches of "
            f"{total} rows. Use a batch size that is a multiple of "
            f"{devices // _greatest_divisor(devices, jax.process_count())}."
        )


def _greatest_divisor(number: int, of: int) -> int:
    return max(n for n in range(1, of + 1) if of % n == 0 and number % n == 0)


def _ignored() -> str | None:
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return f"a keras.distribution.{type(distribution).__name__}, which it ignores"


def _on_tensorflow() -> str | None:
    import tensorflow as tf

    if tf.distribute.has_strategy():
        strategy = tf.distribute.get_strategy()
        if not isinstance(strategy, tf.distribute.OneDeviceStrategy):
            return f"the scope of a tf.distribute.{type(strategy).__name__}"
    return _ignored()


def _on_torch() -> str | None:
    import torch

    parallel = torch.distributed
    if parallel.is_available() and parallel.is_initialized():
        processes = parallel.get_world_size()
        if processes > 1:
            return f"torch.distributed with {processes} processes"
    return _ignored()


_FINDERS = {"tensorflow": _on_tensorflow, "torch": _on_torch}
