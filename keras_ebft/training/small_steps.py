"""Optimizer steps that are too small for the weights they are to change."""

import logging
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ebft.training.optimizers import policy_optimizer

logger = logging.getLogger("keras_ebft")

# Their step is about the learning rate, or a share of it that the weights decide,
# whatever the gradient is.
RATE_SIZED = (
    keras.optimizers.Adam,
    keras.optimizers.Adamax,
    keras.optimizers.Nadam,
    keras.optimizers.Lion,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adafactor,
    keras.optimizers.Lamb,
    keras.optimizers.Muon,
)
HALVES = ("bfloat16", "float16")
# At best, as a share of a number, what is added to it and not rounded away.
SMALLEST_SHARES = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
# Values that are looked at in each weight.
MOST_VALUES = 4096
# What a schedule may come to is found by asking at steps of all sizes.
STEPS = (0, *(10**power for power in range(7)))


def warn_of_a_coarse_copy(model: keras.Model) -> None:
    """Warns where the copy that follows the policy rounds most of its steps away.

    Args:
        model: `EBFTModel`.
    """
    decay, reader = model.feature_network.ema_decay, model.feature_reader
    if not decay or reader is None:
        return
    dtypes = {v.dtype for v in reader.model.variables} & set(HALVES)
    for dtype in sorted(dtypes):
        logger.warning(
            "The network that features come from is %s, and follows the policy by "
            "steps of %.3g of what is between them: a weight is rounded back to what "
            "it was until it is %.2g %% away. Keep the weights in float32 with "
            'dtype="mixed_%s" when the model is made, or lower `ema_decay`.',
            dtype,
            1.0 - decay,
            100 * SMALLEST_SHARES[dtype] / (1.0 - decay),
            dtype,
        )


def warn_of_small_steps(model: keras.Model) -> None:
    """Warns where most weights are too coarse for the optimizer's step.

    A bfloat16 number has 8 significant bits: what is added to a weight and is below
    about a 500th of it is rounded away. Said only of optimizers whose step does not
    depend on the size of the gradient.

    Args:
        model: compiled `EBFTModel`.
    """
    optimizer = policy_optimizer(model.optimizer)
    rate = greatest_rate(optimizer)
    if rate is None:
        return
    policy = [v for v in model.causal_lm.trainable_variables if v.dtype in HALVES]
    share = share_that_moves(policy, [step_size(optimizer, v, rate) for v in policy])
    if share is None or share >= 0.5:
        return
    dtype = policy[0].dtype
    logger.warning(
        "The weights are %s, and an optimizer step at the learning rate %.3g changes "
        "%.2g %% of them: the others are rounded back to what they were. Keep the "
        'weights in float32 with dtype="mixed_%s" when the model is made, or raise '
        "the learning rate.",
        dtype,
        rate,
        100 * share,
        dtype,
    )


def greatest_rate(optimizer: keras.optimizers.Optimizer) -> float | None:
    """The greatest learning rate of an optimizer whose steps are of that size.

    Args:
        optimizer: Keras optimizer.

    Returns:
        float, or `None` for an optimizer whose steps follow the gradient's size.
    """
    if not isinstance(optimizer, RATE_SIZED):
        return None
    # Keras' property gives the value of the moment.
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return max(_number(rate(step)) for step in STEPS)
    return _number(optimizer.learning_rate)


def step_size(
    optimizer: keras.optimizers.Optimizer, variable: keras.Variable, rate: float
) -> float:
    """How far an optimizer of `RATE_SIZED` moves the weights of a variable at once.

    Args:
        optimizer: Keras optimizer.
        variable: Keras variable.
        rate: float, the learning rate.

    Returns:
        float, the root of the mean square of a whole step.
    """
    if isinstance(optimizer, keras.optimizers.Adafactor):
        return rate * max(optimizer.epsilon_2, _size(variable))
    if isinstance(optimizer, keras.optimizers.Lamb):
        return rate * (_size(variable) or 1.0)
    if isinstance(optimizer, keras.optimizers.Muon):
        if optimizer._should_use_adamw(variable):
            return rate * optimizer.adam_lr_ratio
        # Its steps are about orthogonal matrices, of n rows or columns at most.
        scale = optimizer.rms_rate
        return rate * (max(variable.shape) ** -0.5 if scale is None else scale)
    return rate


def share_that_moves(
    variables: list[keras.Variable], steps: list[float]
) -> float | None:
    """The share of weights that adding or subtracting a number changes.

    Args:
        variables: list of Keras variables.
        steps: list of floats, the number for each.

    Returns:
        float, or `None` if there are no weights.
    """
    moved = total = 0.0
    for variable, size_of_step in zip(variables, steps, strict=True):
        values = ops.reshape(ops.convert_to_tensor(variable), (-1,))
        size = int(values.shape[0])
        places = np.linspace(0, size - 1, min(size, MOST_VALUES)).astype("int32")
        values = ops.take(values, places)
        step = ops.cast(size_of_step, values.dtype)
        changed = ops.logical_or(
            ops.not_equal(values + step, values), ops.not_equal(values - step, values)
        )
        moved += size * _number(ops.mean(ops.cast(changed, "float32")))
        total += size
    return moved / total if total else None


def _size(variable: keras.Variable) -> float:
    """The root of the mean square of a variable."""
    values = ops.cast(ops.convert_to_tensor(variable), "float32")
    return _number(ops.sqrt(ops.mean(ops.square(values))))


def _number(value: Any) -> float:
    return float(ops.convert_to_numpy(value))
