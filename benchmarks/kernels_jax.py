"""Checks and times every Pallas kernel on JAX, and writes JSON.

    KERAS_BACKEND=jax python benchmarks/kernels_jax.py results.json

Made for one call on a GPU or TPU, of at most `--seconds` (450). All is compiled by XLA,
the definition too. `--tiny` runs the same code at toy sizes, on a CPU with the kernels
of both platforms interpreted, to see that it runs: its times mean nothing. Compared
with: `jax.nn.dot_product_attention` (through cuDNN on a GPU) and tokamax, if installed,
and on TPU splash attention, all on the same mask; and a matrix product alone.
Times are of the forward pass and of forward and backward.
"""

import dataclasses
import functools
import gc
import importlib.util
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import kernel_harness as harness
import kernels_jax_attention as others
from kernel_harness import able, attempt, load, with_ratios

from keras_ebft.kernels.feature_reward import specs as reward_specs
from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.linear_sample import specs as sample_specs
from keras_ebft.kernels.strided_attention import specs as strided_specs

DEVICE = jax.default_backend()


def milliseconds(function, *arguments):
    """Of a compiled function."""
    return harness.milliseconds(lambda: function(*arguments), jax.block_until_ready)


def tensors(spec, dtype="bfloat16"):
    """The spec's tensors, rounded to bfloat16 whatever their dtype."""
    return [
        jnp.asarray(array, "bfloat16").astype(dtype) for array in spec.arrays().values()
    ]


def with_gradients(function):
    """Outputs and, for random weights of their sum, gradients."""

    def run(*arguments):
        outputs, pull = jax.vjp(function, *arguments)
        leaves, tree = jax.tree.flatten(outputs)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        weights = [
            # The same numbers whatever the dtype.
            jax.random.normal(key, leaf.shape).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves)
        ]
        return outputs, pull(jax.tree.unflatten(tree, weights))

    return run


def timed(function, arguments):
    """Forward time, forward and backward time, and memory taken beyond the inputs."""
    both = jax.jit(with_gradients(function)).lower(*arguments).compile()
    return {
        "forward_ms": milliseconds(jax.jit(function), *arguments),
        "both_ms": milliseconds(both, *arguments),
        "extra_mib": both.memory_analysis().temp_size_in_bytes / 2**20,
    }


def poison():
    """Freed memory is what a kernel's outputs are made of: not-a-number."""
    jnp.full((2**20,), jnp.nan).block_until_ready()


def distance(found, expected):
    found, expected = found.astype("float32"), expected.astype("float32")
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def checked(bind, spec, names):
    """Errors of each implementation in bfloat16, against the definition in float32."""
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients(bind(spec, "reference")))(
            *tensors(spec, "float32")
        )

    def errors_of(name):
        poison()
        found = jax.jit(with_gradients(bind(spec, name)))(*tensors(spec))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact))
        return [distance(one, two) for one, two in pairs]

    return {name: attempt(errors_of, name) for name in names}


def ceilings(tiny):
    """What the device does at best: a matrix product and a copy."""
    size = 64 if tiny else 8192
    one = jnp.ones((size, size), "bfloat16")
    product = milliseconds(jax.jit(jnp.matmul), one, one)
    source = jnp.ones(2**10 if tiny else 2**29, "float32")
    copy = milliseconds(jax.jit(lambda x: x + 1.0), source)
    return {
        "matmul_tflops": 2 * size**3 / product / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e6,
    }


def bind_strided(spec, name):
    run = load("strided_attention", name)
    anchors, _ = spec.places()
    return lambda *arguments: run(*arguments, anchors, **spec.options())


def strided_attention(tiny):
    small = dataclasses.replace(
        strided_specs.BENCHMARK, blocks=16, length=160, samples=2, heads=4, kv_heads=2
    )
    spec = small if tiny else strided_specs.BENCHMARK
    arguments = tensors(spec)
    records = able(
        "strided_attention",
        arguments[0],
        head_size=spec.head_size,
        options=spec.in_use(),
    )
    names = [record.name for record in records]
    times = {
        name: attempt(timed, bind_strided(spec, name), arguments) for name in names
    }
    rows = others.as_rows(spec, *arguments)
    for name, make in others.available(DEVICE).items():
        times[name] = attempt(lambda make=make: timed(make(spec), rows))
    result = {
        "errors": checked(bind_strided, small, names),
        "errors_of_others": {
            name: attempt(others.error, make, small, tensors(small))
            for name, make in others.available(DEVICE).items()
        },
        "times": times,
    }
    harness.with_flops(times, harness.strided_flops(spec))
    with_ratios(times, "both_ms")
    return result


def bind_logprob(spec, name):
    run, labels = load("linear_logprob", name), jnp.asarray(spec.places())
    return lambda *arguments: run(*arguments, labels, **spec.options())


def linear_logprob(tiny):
    small = dataclasses.replace(
        logprob_specs.BENCHMARK, rows=200, width=128, vocabulary=3000
    )
    spec = small if tiny else logprob_specs.BENCHMARK
    arguments = tensors(spec)
    records = able("linear_logprob", arguments[0], options=spec.in_use())
    names = [record.name for record in records]
    times = {
        name: attempt(timed, bind_logprob(spec, name), arguments) for name in names
    }
    times["matmul alone"] = attempt(timed, lambda x, w: x @ w.T, arguments)
    if DEVICE == "tpu" and importlib.util.find_spec("tokamax"):
        times["tokamax"] = attempt(lambda: timed(tokamax_loss(spec), arguments))
    flops = 2 * spec.rows * spec.width * spec.vocabulary
    harness.with_flops(times, flops, backward=2.0)
    with_ratios(times, "both_ms")
    return {"errors": checked(bind_logprob, small, names), "times": times}


def tokamax_loss(spec):
    """The sum of log-probabilities alone, at temperature 1: all it has."""
    import tokamax

    labels = jnp.asarray(spec.places())
    return lambda hidden, head: tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, head.T, reduction="sum"
    )


def linear_sample(tiny):
    small = dataclasses.replace(
        sample_specs.BENCHMARK, rows=200, width=128, vocabulary=3000
    )
    spec = small if tiny else sample_specs.BENCHMARK
    reference = load("linear_sample", "reference")
    with jax.default_matmul_precision("highest"):
        exact, _ = sampled(reference, small, "float32")

    def agreement(run):
        return float((sampled(run, small, "bfloat16")[0] == exact).mean())

    def spent(run):
        elapsed = milliseconds(
            jax.jit(functools.partial(run, **spec.options())),
            *tensors(spec),
            jnp.asarray(spec.places()),
        )
        return {
            "forward_ms": elapsed,
            "head_gb_per_s": 2 * spec.vocabulary * spec.width / elapsed / 1e6,
            "tflops": 2 * spec.rows * spec.vocabulary * spec.width / elapsed / 1e9,
        }

    result = {"same_tokens": {}, "times": {}}
    options = spec.in_use()
    for record in able("linear_sample", jnp.ones(1), options=options):
        run = record.load()
        result["same_tokens"][record.name] = attempt(agreement, run)
        result["times"][record.name] = attempt(spent, run)
    with_ratios(result["times"], "forward_ms")
    return result


def sampled(run, spec, dtype):
    run = jax.jit(functools.partial(run, **spec.options()))
    return run(*tensors(spec, dtype), jnp.asarray(spec.places()))


def feature_reward(tiny):
    """Float32, as feature networks give it; 16 samples besides the paper's 4."""
    return {f"{samples} samples": rewards_of(samples, tiny) for samples in (4, 16)}


def rewards_of(samples, tiny):
    spec = dataclasses.replace(reward_specs.BENCHMARK, samples=samples)
    small = dataclasses.replace(spec, batch=1, blocks=3, width=96)
    arguments = tensors(small if tiny else spec, "float32")

    def bound(run):
        return jax.jit(functools.partial(run, **spec.options()))

    reference = load("feature_reward", "reference")
    with jax.default_matmul_precision("highest"):
        exact = bound(reference)(*tensors(small, "float32"))

    def errors_of(run):
        poison()
        found = bound(run)(*tensors(small, "float32"))
        return {k: float(jnp.abs(v - exact[k]).max()) for k, v in found.items()}

    def spent(run):
        elapsed = milliseconds(bound(run), *arguments)
        read = sum(argument.nbytes for argument in arguments)
        return {"forward_ms": elapsed, "features_gb_per_s": read / elapsed / 1e6}

    result = {"errors": {}, "times": {}}
    for record in able("feature_reward", arguments[0], "float32"):
        run = record.load()
        result["errors"][record.name] = attempt(errors_of, run)
        result["times"][record.name] = attempt(spent, run)
    with_ratios(result["times"], "forward_ms")
    return result


SECTIONS = (ceilings, linear_logprob, strided_attention, linear_sample, feature_reward)


def describe():
    packages = ("jax", "jaxlib", "libtpu", "tokamax", "keras")
    name = jax.devices()[0].device_kind
    return {"device": DEVICE, "name": name, "versions": harness.versions(*packages)}


if __name__ == "__main__":
    harness.run(__doc__, SECTIONS, describe, clean=gc.collect)
