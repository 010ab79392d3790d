"""Compiles every Pallas kernel for a TPU that is not there.

    PYTHONPATH=.:.venv/libtpu .venv/bin/python benchmarks/compile_tpu.py v5e v6e

The TPU compiler (`pip install --no-deps --target .venv/libtpu "libtpu==0.0.42.*"`, what
`jax[tpu]` asks for) runs without its chip: a kernel that the chip would refuse, or
that needs more memory on the chip than it asks for, fails here. It says nothing
about numbers or speed.
"""

import argparse
import dataclasses
import functools
import os
import time

# Beside a PyTorch or TensorFlow that is loaded, the TPU runtime must stay asleep.
os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from keras_ebft import kernels
from keras_ebft.kernels.feature_reward import specs as reward
from keras_ebft.kernels.linear_logprob import specs as logprob
from keras_ebft.kernels.linear_sample import specs as sample
from keras_ebft.kernels.strided_attention import specs as strided

RAGGED = {"rows": 50, "vocabulary": 300, "width": 72}
WIDEST = {"rows": 300, "vocabulary": 1000, "width": 16384}
# A whole vocabulary makes a large array of random numbers, and no other kernel.
HEAD = dataclasses.replace(logprob.BENCHMARK, rows=1000, vocabulary=8193)
CASES = (
    ("linear_logprob", HEAD, "bfloat16", {"temperature": 0.6}),
    (
        "linear_logprob",
        dataclasses.replace(HEAD, width=5376, rows=600),
        "bfloat16",
        {"soft_cap": 30.0},
    ),
    ("linear_logprob", dataclasses.replace(HEAD, width=8192), "float32", {}),
    ("linear_logprob", dataclasses.replace(HEAD, **WIDEST), "float32", {}),
    ("linear_logprob", dataclasses.replace(HEAD, **RAGGED), "bfloat16", {}),
    ("strided_attention", strided.BENCHMARK, "bfloat16", {"scale": 0.1}),
    *(
        (
            "strided_attention",
            dataclasses.replace(
                strided.BENCHMARK,
                heads=8,
                kv_heads=2,
                head_size=head_size,
                tensor_anchors=True,
            ),
            dtype,
            {"scale": 0.1, "sliding_window": 300, "soft_cap": 30.0},
        )
        for head_size, dtype in [
            (8, "bfloat16"),
            (80, "bfloat16"),
            (128, "bfloat16"),
            (128, "float32"),
            (256, "bfloat16"),
            (256, "float32"),
        ]
    ),
    (
        "strided_attention",
        dataclasses.replace(strided.BENCHMARK, queries=1, keys=7, length=275),
        "bfloat16",
        {"scale": 0.1, "query_offset": 3},
    ),
)


# Nothing of these is made, only shapes: the rollouts of one document, and of 16.
ROLLOUTS = sample.BENCHMARK
SAMPLES = (
    (ROLLOUTS, "bfloat16", {"temperature": 0.6}),
    (ROLLOUTS, "bfloat16", {"temperature": 0.0, "soft_cap": 30.0}),
    (dataclasses.replace(ROLLOUTS, rows=16 * 508), "bfloat16", {"temperature": 0.6}),
    (dataclasses.replace(ROLLOUTS, **RAGGED), "bfloat16", {"soft_cap": 30.0}),
    (dataclasses.replace(ROLLOUTS, width=5376), "bfloat16", {"soft_cap": 30.0}),
    (dataclasses.replace(ROLLOUTS, width=16384), "float32", {}),
)
FEATURES = reward.BENCHMARK
REWARDS = (
    (FEATURES, "float32"),
    (FEATURES, "bfloat16"),
    (dataclasses.replace(FEATURES, samples=16, unbiased=True), "float32"),
    (dataclasses.replace(FEATURES, samples=16, whitening="feature"), "bfloat16"),
    (dataclasses.replace(FEATURES, samples=1, blocks=1, width=200), "float32"),
    (dataclasses.replace(FEATURES, samples=7, features=3, width=2048), "float32"),
    (dataclasses.replace(FEATURES, samples=3, batch=16, whitening=None), "float32"),
)


def kernel(op):
    """The implementation for TPUs."""
    records = kernels.implementations(op)
    return next(r for r in records if r.name == "pallas_tpu").load()


def compile_sampling(spec, dtype, options, device):
    """Compiles sampling; returns seconds."""
    shapes = ((spec.rows, spec.width), (spec.vocabulary, spec.width), (spec.rows,))
    arrays = list(zip(shapes, (dtype, dtype, "float32")))
    return compile_forward("linear_sample", arrays, options, device)


def compile_rewards(spec, dtype, device):
    """Compiles rewards; returns seconds."""
    lead = (spec.batch, spec.samples, spec.blocks, spec.features, spec.width)
    arrays = [(lead, dtype), ((lead[0], *lead[2:]), dtype)]
    return compile_forward("feature_reward", arrays, spec.options(), device)


def compile_forward(op, arrays, options, device):
    """Compiles what has no gradient, for `(shape, dtype)` pairs; returns seconds."""
    sharding = SingleDeviceSharding(device)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays
    ]
    run = functools.partial(kernel(op), interpret=False, **options)
    start = time.monotonic()
    jax.jit(run).lower(*arrays).compile()
    return time.monotonic() - start


def compile_case(op, spec, dtype, options, device):
    """Compiles one kernel with its backward pass; returns seconds."""
    run = kernel(op)
    places = spec.places()
    places = places if isinstance(places, tuple) else (places,)
    sharding = SingleDeviceSharding(device)
    arrays = [
        jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)
        for array in spec.arrays().values()
    ]

    def summed(*arrays):
        outputs = run(*arrays, *places[:1], interpret=False, **options)
        return sum(out.astype("float32").sum() for out in jax.tree.leaves(outputs))

    function = jax.value_and_grad(summed, argnums=tuple(range(len(arrays))))
    start = time.monotonic()
    jax.jit(function).lower(*arrays).compile()
    return time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="+", choices=["v5e", "v6e"])
    for chip in parser.parse_args().chips:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:2x2"
        )
        for op, spec, dtype, options in CASES:
            seconds = compile_case(op, spec, dtype, options, topology.devices[0])
            report(chip, op, spec, dtype, options, seconds)
        for spec, dtype, options in SAMPLES:
            seconds = compile_sampling(spec, dtype, options, topology.devices[0])
            report(chip, "linear_sample", spec, dtype, options, seconds)
        for spec, dtype in REWARDS:
            seconds = compile_rewards(spec, dtype, topology.devices[0])
            options = {f"{spec.samples} samples", str(spec.whitening)}
            report(chip, "feature_reward", spec, dtype, options, seconds)


def report(chip, op, spec, dtype, options, seconds):
    """Prints one line."""
    sizes = dataclasses.asdict(spec)
    sizes = [sizes[name] for name in ("width", "head_size") if name in sizes]
    print(
        f"{chip} {op} {dtype} width {sizes[0]} {sorted(options)}: "
        f"compiled in {seconds:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
