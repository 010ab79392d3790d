"""Updates of weights by parts, which need no memory beside weights and slots.

Most optimizers change every number of a weight by its own gradient and its own slots
alone. PyTorch computes such an update for some rows at a time (`row_updates`),
TensorFlow by one program for all weights of a shape (`program_updates`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_ebft.backend.program_updates import by_programs
from keras_ebft.backend.row_updates import by_rows
from keras_ebft.backend.runtime import backend_name
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
    optimizer: keras.optimizers.Optimizer, all_finite: Callable[[Sequence[Any]], Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """Two functions of gradients, their weights and the learning rate.

    Args:
        optimizer: one that `updates_by_parts`.
        all_finite: function of a list of tensors that returns a bool scalar.

    Returns:
        `(rehearse, update)`: the first changes nothing and returns a bool scalar,
        whether what the second leads to is finite, weights and slots.
    """
    way = by_rows if backend_name() == "torch" else by_programs
    return way(optimizer, all_finite)
