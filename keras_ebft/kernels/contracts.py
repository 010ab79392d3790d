"""How near an implementation must come to its definition, and how near it comes.

The tests of every implementation and the qualification of those that are not proven
share these numbers.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_ebft.backend.measuring import (
    exact_products,
    poisoned_memory,
    with_gradients,
    without_gradients,
)

# Relative errors in the Euclidean norm. bfloat16 has 8 bits, float16 11; what the plain
# definition itself loses to them is allowed to everyone.
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 4e-3
FLOAT16_TOLERANCE = 5e-4
TOLERANCES = {
    "float32": FLOAT32_TOLERANCE,
    "bfloat16": BFLOAT16_TOLERANCE,
    "float16": FLOAT16_TOLERANCE,
}
# How much more than the plain definition loses to rounding is allowed.
ROUNDING_FACTOR = 1.5
# Of the cumulative distribution, where one token ends and the next begins. The
# largest uniform numbers count as 1 - 1e-6.
EDGE_TOLERANCE = 5e-6
# Of a sampled token's log-probability.
LOG_PROB_TOLERANCE = 2e-5
# Both, beyond what the plain definition loses to bfloat16.
BFLOAT16_SAMPLE_TOLERANCE = 1e-5
# Of rewards, relative and absolute: they are of order one.
REWARD_TOLERANCE = 2e-5


class Deviation(NamedTuple):
    """How far one output or gradient is from where it should be.

    Attributes:
        what: str, which one, and of which spec.
        error: float; not-a-number where something was not written or not finite.
        allowed: float.
    """

    what: str
    error: float
    allowed: float

    @property
    def is_allowed(self):
        """Whether it is near enough; not-a-number is not."""
        return bool(self.error <= self.allowed)

    @property
    def share(self):
        """Error over what is allowed; infinite for not-a-number."""
        share = self.error / self.allowed
        return share if np.isfinite(share) else np.inf


def deviations(spec, run, definition, dtype):
    """How far an implementation is from the definition, everywhere.

    The implementation runs first, in memory that holds not-a-number: nothing right
    lies there that it could have left unwritten.

    Args:
        spec: `Spec` of a path, of a call that the implementation supports.
        run: the implementation, a function with the signature of the path.
        definition: the plain definition.
        dtype: str, `"float32"` or `"bfloat16"`.

    Returns:
        list of `Deviation`, one per output and gradient.
    """
    if spec.differentiable:
        return _of_gradients(spec, run, definition, dtype)
    if hasattr(spec, "vocabulary"):
        return _of_samples(spec, run, definition, dtype)
    return _of_rewards(spec, run, definition, dtype)


def error(found, expected):
    """Distance over the expected norm; infinite for another shape."""
    if found.shape != expected.shape:
        return np.inf
    # An array of zeros, of keys that nobody sees, say, must be found as such.
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-30)


def tensors(arrays, dtype):
    """Arrays as tensors, rounded to `dtype`."""
    return [ops.convert_to_tensor(array, dtype=dtype) for array in arrays.values()]


def outputs_and_gradients(function, arguments, seed=3):
    """What a function of tensors returns, and the gradients of it.

    Args:
        function: function that returns a tuple of tensors.
        arguments: list of tensors.
        seed: int, of the random numbers that outputs are weighted with.

    Returns:
        `(outputs, gradients)`, lists of float64 NumPy arrays.
    """

    def weigh(outputs):
        random = np.random.default_rng(seed)
        return tuple(
            ops.convert_to_tensor(random.normal(size=tuple(o.shape)), dtype=o.dtype)
            for o in outputs
        )

    outputs, gradients = with_gradients(function, weigh)(*arguments)
    return [_numpy(outputs), _numpy(gradients)]


def _numpy(values):
    return [
        ops.convert_to_numpy(ops.cast(v, "float32")).astype("float64") for v in values
    ]


def _of_gradients(spec, run, definition, dtype):
    arrays = spec.arrays()
    rounded = [ops.cast(t, "float32") for t in tensors(arrays, dtype)]
    with poisoned_memory():
        found = outputs_and_gradients(spec.bind(run), tensors(arrays, dtype))
    plain = outputs_and_gradients(spec.bind(definition), tensors(arrays, dtype))
    with exact_products():
        exact = outputs_and_gradients(spec.bind(definition), rounded)
    names = [f"output {i}" for i in range(len(exact[0]))]
    names += [f"gradient by {name}" for name in arrays]
    return [
        Deviation(
            f"{name} ({spec.name})",
            error(one, three),
            ROUNDING_FACTOR * error(two, three) + TOLERANCES[dtype],
        )
        for name, one, two, three in zip(
            names, *([*part[0], *part[1]] for part in (found, plain, exact))
        )
    ]


def _of_samples(spec, run, definition, dtype):
    arrays = spec.arrays()
    with poisoned_memory():
        found = without_gradients(spec.bind(run))(*tensors(arrays, dtype))
        found = [ops.convert_to_numpy(value) for value in found]
    plain = without_gradients(spec.bind(definition))(*tensors(arrays, dtype))
    plain = [ops.convert_to_numpy(value) for value in plain]
    least = (EDGE_TOLERANCE, LOG_PROB_TOLERANCE)
    if dtype != "float32":
        least = (BFLOAT16_SAMPLE_TOLERANCE,) * 2
    return [
        Deviation(f"{name} ({spec.name})", one.max(), ROUNDING_FACTOR * two.max() + add)
        for name, one, two, add in zip(
            ("token", "log-probability"),
            sample_errors(spec, *found, dtype),
            sample_errors(spec, *plain, dtype),
            least,
        )
    ]


def sample_errors(spec, tokens, log_prob, dtype="float32"):
    """How far tokens and log-probabilities are from float64, each `[R]`.

    A token is off by the distance of its uniform number to the interval of the
    cumulative distribution that belongs to the token; greedy, by the probability
    that it lacks. No token at all is infinitely far off.
    """
    hidden, head = (
        ops.convert_to_numpy(ops.cast(tensor, "float32")).astype("float64")
        for tensor in tensors(spec.arrays(), dtype)
    )
    if tokens.min() < 0 or tokens.max() >= spec.vocabulary:
        return np.full((2, spec.rows), np.inf)
    logits = hidden @ head.T
    if spec.soft_cap is not None:
        logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
    logits = logits / (spec.temperature or 1.0)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(tokens))
    chosen = p[rows, tokens]
    kept = truncated(p, spec.top_k, spec.top_p)
    end = np.cumsum(kept, axis=1)[rows, tokens]
    begin = end - kept[rows, tokens]
    uniform = spec.places().astype("float64")
    off = np.maximum(np.maximum(begin - uniform, uniform - end), 0.0)
    if spec.temperature == 0.0:
        off = p.max(axis=1) - chosen
    return off, np.abs(log_prob - np.log(chosen))


def truncated(p, top_k, top_p):
    """Probabilities of the `top_k` and then the nucleus `top_p`, in float64."""
    largest = np.sort(p, axis=1)[:, ::-1][:, : top_k or p.shape[1]]
    before = np.cumsum(largest, axis=1) - largest
    inside = before < top_p * largest.sum(axis=1, keepdims=True)
    least = np.where(inside, largest, 1.0).min(axis=1, keepdims=True)
    kept = np.where(p >= least, p, 0.0)
    return kept / kept.sum(axis=1, keepdims=True)


def _of_rewards(spec, run, definition, dtype):
    """The definition reads bfloat16 as float32: no more is lost there."""
    arrays = spec.arrays()
    with poisoned_memory():
        found = _rewards(spec, run, tensors(arrays, dtype))
    plain = _rewards(spec, definition, tensors(arrays, dtype))
    with exact_products():
        exact = _rewards(spec, definition, tensors(arrays, dtype))
    return [
        Deviation(
            f"{name} ({spec.name})",
            _reward_error(found.get(name), three),
            ROUNDING_FACTOR * _reward_error(plain[name], three) + REWARD_TOLERANCE,
        )
        for name, three in exact.items()
    ]


def _rewards(spec, run, arguments):
    found = without_gradients(spec.bind(run))(*arguments)
    return {name: ops.convert_to_numpy(value) for name, value in found.items()}


def _reward_error(found, expected):
    if found is None or found.shape != expected.shape:
        return np.inf
    return np.max(np.abs(found - expected) / (1.0 + np.abs(expected)))
