"""Checks on what a user passes in: each raises a message that says what to do.

Every helper takes the argument's name first, so that the error names it.
"""

import numbers
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

# What an int32 holds, as sizes and seeds have to fit.
MOST_INT = 2**31 - 1
# Weights beyond overflow float32 together with what they weigh.
MOST_WEIGHT = 1e6


def check_int(name: str, value: Any, minimum: int, maximum: int = MOST_INT) -> int:
    """Returns `value` as an `int` of at least `minimum` and at most `maximum`.

    Raises:
        TypeError: if `value` is not an integer (booleans are not).
        ValueError: if `value` is below `minimum` or above `maximum`.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"Expected `{name}` to be an integer of at least {minimum}. "
            f"Received: {name}={value!r} (of type {type(value).__name__}). "
            f"Pass an int, for example {name}={max(minimum, 1)}."
        )
    if value < minimum:
        raise ValueError(
            f"Expected `{name}` to be at least {minimum}. "
            f"Received: {name}={value}. Pass a larger value."
        )
    if int(value) > maximum:
        raise ValueError(
            f"Expected `{name}` to be at most {maximum}. "
            f"Received: {name}={value}. Pass a smaller value."
        )
    return int(value)


def check_bool(name: str, value: Any) -> bool:
    """Returns `value` if it is a boolean.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"Expected `{name}` to be True or False. Received: {name}={value!r} (of "
            f"type {type(value).__name__})."
        )
    return bool(value)


def check_micro_batches(value: Any, num_samples: int) -> int:
    """Returns `value` if so many groups of equal size can be made of the samples.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it does not divide `num_samples`.
    """
    value = check_int("micro_batches", value, 1)
    if num_samples % value:
        divisors = [n for n in range(1, num_samples + 1) if num_samples % n == 0]
        raise ValueError(
            "Expected `micro_batches` to divide the samples of a block evenly. "
            f"Received: micro_batches={value} with num_samples={num_samples}. Use one "
            f"of {divisors}."
        )
    return value


def check_number(
    name: str,
    value: Any,
    minimum: float,
    maximum: float = np.inf,
    exclusive: bool = False,
) -> float:
    """Returns `value` as a finite `float` in a range.

    Args:
        name: the argument's name.
        value: what was received.
        minimum: float, smallest value.
        maximum: float, largest value.
        exclusive: bool, whether `minimum` itself is refused.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if `value` is not finite or out of range.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"Expected `{name}` to be a number. Received: {name}={value!r} "
            f"(of type {type(value).__name__}). Pass a float."
        )
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    too_small = number <= minimum if exclusive else number < minimum
    if not np.isfinite(number) or too_small or number > maximum:
        bound = f"greater than {minimum}" if exclusive else f"at least {minimum}"
        if np.isfinite(maximum):
            bound += f" and at most {maximum}"
        raise ValueError(
            f"Expected `{name}` to be finite and {bound}. "
            f"Received: {name}={value}. Pass a value in that range."
        )
    return number


def check_stop_token_ids(value: Any) -> tuple[int, ...] | str | None:
    """Returns stop tokens as a tuple of ints; `"auto"` and `None` pass through.

    Raises:
        TypeError: if `value` is neither, nor a list or tuple of ints.
        ValueError: if a token id is negative.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            'Expected `stop_token_ids` to be "auto", None or a tuple of token ids. '
            f"Received: stop_token_ids={value!r} (of type {type(value).__name__})."
        )
    return tuple(check_int("stop_token_ids", token, 0) for token in value)


def check_integers(name: str, values: np.ndarray) -> None:
    """Checks that an array holds integers.

    Raises:
        TypeError: if it does not (booleans are none).
    """
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"Expected `{name}` to be integers. Received: an array of dtype "
            f"{values.dtype}. Convert them with .astype('int32')."
        )


def check_id_range(token_ids: np.ndarray, size: int | None = None) -> None:
    """Checks that token ids are those of a vocabulary, or of any.

    Args:
        token_ids: int array of any shape.
        size: int, how many the vocabulary has; `None` for all that an int32 holds.

    Raises:
        ValueError: for an id below 0 or beyond the vocabulary.
    """
    most = MOST_INT if size is None else size - 1
    if token_ids.size and (token_ids.min() < 0 or token_ids.max() > most):
        of = "what an int32 holds" if size is None else "the model's vocabulary"
        raise ValueError(
            f"Expected token ids from 0 to {most}, {of}. "
            f"Received: ids from {token_ids.min()} to {token_ids.max()}. Use the "
            "tokenizer the model was trained with."
        )


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Returns `value` if it is one of `choices`.

    Raises:
        ValueError: if it is not; the message lists the choices.
    """
    choices = list(choices)
    # An array would be compared element by element.
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(
            f"Expected `{name}` to be one of {choices}. "
            f"Received: {name}={value!r}. Pick a name from that list."
        )
    return value


def check_weight(name: str, value: Any) -> Any:
    """Returns a weight of the loss: a float from 0 to 1e6, or a schedule.

    Raises:
        TypeError: if `value` is neither a number nor a
            `keras.optimizers.schedules.LearningRateSchedule`.
        ValueError: if it is negative, greater or not finite.
    """
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    return check_number(name, value, 0.0, MOST_WEIGHT)


def check_temperature(value: Any) -> float:
    """Returns a temperature: 0, for the likeliest token, or from 1e-4 to 1e4.

    Logits divided by less, or log-probabilities of logits divided by more, are not
    what float32 can tell apart.

    Raises:
        TypeError: if `value` is not a number.
        ValueError: if it is anything else.
    """
    number = check_number("temperature", value, 0.0, 1e4)
    if 0.0 < number < 1e-4:
        raise ValueError(
            "Expected `temperature` to be 0 or at least 0.0001. Received: "
            f"temperature={value}. Pass 0 for the likeliest token."
        )
    return number


def check_clip_range(value: Any) -> tuple[float, float] | None:
    """Returns a clip range as `(low, high)`, or `None`.

    Raises:
        TypeError: if `value` is neither `None`, a number nor a pair of numbers.
        ValueError: if a number is negative, or `low` above 1.
    """
    if value is None:
        return None
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(
            "Expected `clip_range` to be a float or (low, high). Received: "
            f"clip_range={value!r}. Pass for example clip_range=0.2."
        )
    low = check_number("clip_range", pair[0], 0.0, 1.0)
    return low, check_number("clip_range", pair[1], 0.0, MOST_WEIGHT)


def check_some_weight(**weights: Any) -> None:
    """Checks that at least one of the named weights is not zero.

    Raises:
        ValueError: if all are zero, because nothing would be trained.
    """
    if all(is_zero(weight) for weight in weights.values()):
        received = ", ".join(f"{name}={value}" for name, value in weights.items())
        raise ValueError(
            "Expected at least one weight to be non-zero, or nothing is trained. "
            f"Received: {received}. Set one of them to a positive value."
        )


def is_zero(weight: Any) -> bool:
    """Whether a weight is the number 0; a schedule is not."""
    return isinstance(weight, float) and weight == 0.0


def check_instance(name: str, value: Any, expected: type, remedy: str) -> Any:
    """Returns `value` if it is an instance of `expected`.

    Raises:
        TypeError: if it is not; the message ends with `remedy`.
    """
    if not isinstance(value, expected):
        raise TypeError(
            f"Expected `{name}` to be a {expected.__name__}. "
            f"Received: {value!r} (of type {type(value).__name__}). {remedy}"
        )
    return value
