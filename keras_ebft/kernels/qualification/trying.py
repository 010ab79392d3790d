"""One trial: right within the contract's tolerances, and faster."""

import functools
import importlib
import math

import keras
import numpy as np
from keras import ops

from keras_ebft.backend.measuring import (
    milliseconds,
    set_product_precision,
    with_gradients,
    without_gradients,
)
from keras_ebft.kernels.contracts import Deviation, deviations
from keras_ebft.kernels.qualification.trial import Verdict

# At the call's own shape, against what runs otherwise, which rounds too: what is
# further off is not rounding.
LARGE_TOLERANCE = 0.05
# What backends say where memory is short, which is no fault of the kernel.
OUT_OF_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "OutOfMemory")


def try_out(trial):
    """Checks and times an implementation.

    Args:
        trial: `Trial`.

    Returns:
        `Verdict`; `"failed"` or `"unchecked"` for whatever is raised.
    """
    set_product_precision(trial.precision)
    try:
        return _tried(trial)
    except Exception as error:  # whatever a kernel raises is its verdict
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        is_short = any(sign in text or sign in str(error) for sign in OUT_OF_MEMORY)
        return Verdict("unchecked" if is_short else "failed", text)


def _tried(trial):
    run, plain, definition = (
        _load(target)
        for target in (trial.target, trial.plain_target, trial.definition_target)
    )
    checks, timing = trial.specs()
    found = []
    for spec in checks:
        found += deviations(spec, run, definition, trial.dtype)
        if not all(deviation.is_allowed for deviation in found):
            return _verdict("wrong", found)
    arguments = random_tensors(timing, trial.dtype)
    forms = _forms(timing, run, plain)
    large = _large_deviations(forms, arguments, timing)
    if not all(deviation.is_allowed for deviation in large):
        return _verdict("wrong", large)
    times = {}
    for what, functions in forms.items():
        calls = {
            name: functools.partial(function, *arguments)
            for name, function in functions.items()
        }
        measured = milliseconds(calls)
        times[what] = [measured["own"], measured["other"]]
    is_faster = all(own < other for own, other in times.values())
    return _verdict("faster" if is_faster else "slower", found, times)


def random_tensors(spec, dtype):
    """Tensors of a spec's shapes, made on the device; products are of order one."""
    return [
        ops.cast(
            keras.random.normal(shape, stddev=shape[-1] ** -0.25, seed=seed), dtype
        )
        for seed, shape in enumerate(spec.shapes().values())
    ]


def _forms(spec, run, plain):
    """What is timed, of either implementation: forward, and with backward."""
    bound = {"own": spec.bind(run), "other": spec.bind(plain)}
    forms = {"forward": {n: without_gradients(f) for n, f in bound.items()}}
    if spec.differentiable:

        def weigh(outputs):
            return tuple(ops.ones_like(output) for output in outputs)

        forms["with backward"] = {n: with_gradients(f, weigh) for n, f in bound.items()}
    return forms


def _large_deviations(forms, arguments, spec):
    """How far the two are from each other at the call's own shape."""
    *_, functions = forms.values()
    own, other = (
        keras.tree.flatten(functions[name](*arguments)) for name in ("own", "other")
    )
    # A rounded sum ends at a token nearby.
    span = getattr(spec, "vocabulary", 1)
    # Rewards are of order one: where they come to zero, rounding is all that is left.
    is_reward = not spec.differentiable and span == 1
    return [
        Deviation(
            f"result {i} (call)", _distance(a, b, span, is_reward), LARGE_TOLERANCE
        )
        for i, (a, b) in enumerate(zip(own, other))
        # What is sampled may differ; so may its log-probability.
        if spec.differentiable or i == 0 or not hasattr(spec, "vocabulary")
    ]


def _distance(found, expected, span, is_reward=False):
    if tuple(found.shape) != tuple(expected.shape):
        return float("inf")
    off = ops.cast(found, "float32") - ops.cast(expected, "float32")
    if "int" in keras.backend.standardize_dtype(found.dtype):
        return float(ops.mean(ops.abs(off))) / span
    norm = float(ops.norm(ops.reshape(ops.cast(expected, "float32"), (-1,))))
    if is_reward:
        norm += math.prod(expected.shape) ** 0.5
    return float(ops.norm(ops.reshape(off, (-1,)))) / (norm + 1e-30)


def _verdict(outcome, found, times=None):
    worst = max(found, key=lambda deviation: deviation.share)
    # What is not a number cannot be written down as one everywhere.
    error = float(np.nan_to_num(worst.error, nan=np.inf, posinf=1e30))
    return Verdict(
        outcome,
        what=worst.what,
        error=min(error, 1e30),
        allowed=float(worst.allowed),
        times=times,
    )


def _load(target):
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
