"""Checks on what a user passes in: each raises a message that says what to do.

Every helper takes the argument's name first, so that the error names it.
"""

import numbers

import numpy as np


def check_int(name, value, minimum):
    """Returns `value` as an `int` of at least `minimum`.

    Raises:
        TypeError: if `value` is not an integer (booleans are not).
        ValueError: if `value` is below `minimum`.
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
    return int(value)


def check_number(name, value, minimum, exclusive=False):
    """Returns `value` as a finite `float` of at least (or above) `minimum`.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if `value` is not finite or too small.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"Expected `{name}` to be a number. Received: {name}={value!r} "
            f"(of type {type(value).__name__}). Pass a float."
        )
    too_small = value <= minimum if exclusive else value < minimum
    if not np.isfinite(value) or too_small:
        bound = f"greater than {minimum}" if exclusive else f"at least {minimum}"
        raise ValueError(
            f"Expected `{name}` to be finite and {bound}. "
            f"Received: {name}={value}. Pass a value in that range."
        )
    return float(value)


def check_choice(name, value, choices):
    """Returns `value` if it is one of `choices`.

    Raises:
        ValueError: if it is not; the message lists the choices.
    """
    if value not in choices:
        raise ValueError(
            f"Expected `{name}` to be one of {list(choices)}. "
            f"Received: {name}={value!r}. Pick a name from that list."
        )
    return value


def check_some_weight(**weights):
    """Checks that at least one of the named weights is not zero.

    Raises:
        ValueError: if all are zero, because nothing would be trained.
    """
    if all(weight == 0.0 for weight in weights.values()):
        received = ", ".join(f"{name}={value}" for name, value in weights.items())
        raise ValueError(
            "Expected at least one weight to be non-zero, or nothing is trained. "
            f"Received: {received}. Set one of them to a positive value."
        )


def check_instance(name, value, expected, remedy):
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
