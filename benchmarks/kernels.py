"""Builds, checks and times every kernel on PyTorch; writes JSON.

    KERAS_BACKEND=torch python benchmarks/kernels.py results.json

Made for one call on a borrowed GPU, of at most `--seconds` (450). Every number is
measured in this call; what fails or is out of time says so in the JSON, and the exit
code is then 1. `--tiny` runs the same code at toy sizes, on a CPU too, to see that it
runs: its times mean nothing.
Compared with, where installed: PyTorch's FlexAttention, Liger. Their times are of the
forward pass and of forward and backward.
"""

import dataclasses
import gc
import importlib.util
import os
import platform

os.environ.setdefault("KERAS_BACKEND", "torch")

import kernel_harness as harness
import torch
from kernel_harness import able, attempt, load, with_ratios

from keras_ebft.kernels.feature_reward import specs as reward_specs
from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.linear_sample import specs as sample_specs
from keras_ebft.kernels.strided_attention import specs as strided_specs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(function):
    return harness.milliseconds(function, lambda _: synchronize())


def tensors(spec, dtype=DTYPE, gradients=True):
    """The spec's tensors, rounded to bfloat16 whatever their dtype."""
    return [
        torch.from_numpy(array).to(DEVICE, DTYPE).to(dtype).requires_grad_(gradients)
        for array in spec.arrays().values()
    ]


def timed(function, arguments):
    """Forward time, forward and backward time, and memory taken beyond the inputs."""
    with torch.no_grad():
        forward = milliseconds(lambda: function(*arguments))

    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(output) for output in outputs]
    del outputs

    def both():
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, arguments, weights)

    result = {"forward_ms": forward, "both_ms": milliseconds(both)}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        result["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def ceilings(tiny):
    """What the device does at best: a matrix product and a copy."""
    size = 64 if tiny else 8192
    one, two = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in "ab")
    product = milliseconds(lambda: one @ two)
    source = torch.randn(2**10 if tiny else 2**29, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    return {
        "matmul_tflops": 2 * size**3 / product / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e6,
    }


def timings(bind, spec, names, arguments):
    """Times of implementations and of the compiled definition, by name."""
    times = {name: attempt(timed, bind(spec, name), arguments) for name in names}
    if DEVICE == "cuda":
        plain = torch.compile(bind(spec, "reference"))
        times["reference, compiled"] = attempt(timed, plain, arguments)
    return times


def distance(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def checked(bind, spec, names):
    """Errors of each implementation in bfloat16, against the definition in float64."""
    exact = measure(bind(spec, "reference"), tensors(spec, torch.float64))

    def errors_of(name):
        # Poison: freed memory is what a kernel's outputs are made of.
        torch.full((2**20,), float("nan"), device=DEVICE)
        found = measure(bind(spec, name), tensors(spec))
        return [distance(one, two) for one, two in zip(found, exact)]

    return {name: attempt(errors_of, name) for name in names}


def measure(function, arguments):
    """Outputs and gradients."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(o.shape, generator=random).to(o.device, o.dtype) for o in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, arguments, weights)]


def bind_strided(spec, name):
    run = load("strided_attention", name)
    anchors, _ = spec.places()
    return lambda *arguments: run(*arguments, anchors, **spec.options())


def strided_attention(tiny):
    small = dataclasses.replace(strided_specs.BENCHMARK, blocks=16, length=160)
    spec = small if tiny else strided_specs.BENCHMARK
    arguments = tensors(spec)
    found = able(
        "strided_attention",
        arguments[0],
        head_size=spec.head_size,
        options=spec.in_use(),
    )
    names = [record.name for record in found]
    result = {"errors": checked(bind_strided, small, names)}
    result["times"] = timings(bind_strided, spec, names, arguments)
    if DEVICE == "cuda":
        result["times"]["flex_attention"] = attempt(
            lambda: timed(*flex_attention(spec, arguments))
        )
    harness.with_flops(result["times"], harness.strided_flops(spec))
    with_ratios(result["times"], "both_ms")
    return result


def flex_attention(spec, arguments):
    """The same attention by FlexAttention: keys of document and blocks in one row."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    anchors = torch.from_numpy(spec.places()[0]).to(DEVICE)
    samples, blocks, steps, length = (
        spec.samples, spec.blocks, spec.queries, spec.length,
    )  # fmt: skip
    count = samples * blocks * steps

    def seen(_batch, _head, query, key):
        own = key - length
        same = (own // steps == query // steps) & (own % steps <= query % steps)
        anchor = anchors[(query // steps) % blocks]
        return torch.where(key < length, key < anchor, same)

    mask = torch.compile(create_block_mask)(
        seen, None, None, count, length + count, device=DEVICE
    )
    attend = torch.compile(flex_attention)

    def joined(own, document):
        own = own.reshape(spec.batch, count, spec.kv_heads, spec.head_size)
        return torch.cat([document, own], dim=1).transpose(1, 2).detach()

    query, key, value, document_key, document_value = arguments
    query = query.reshape(spec.batch, count, spec.heads, spec.head_size)
    rows = [
        query.transpose(1, 2).detach().contiguous(),
        joined(key, document_key).contiguous(),
        joined(value, document_value).contiguous(),
    ]
    rows = [row.requires_grad_() for row in rows]

    def run(query, key, value):
        return attend(
            query, key, value, block_mask=mask, scale=spec.scale, enable_gqa=True
        )

    return run, rows


def bind_logprob(spec, name):
    run = load("linear_logprob", name)
    labels = torch.from_numpy(spec.places()).to(DEVICE)
    return lambda *arguments: run(*arguments, labels, **spec.options())


def linear_logprob(tiny):
    small = dataclasses.replace(
        logprob_specs.BENCHMARK, rows=200, width=128, vocabulary=3000
    )
    spec = small if tiny else logprob_specs.BENCHMARK
    arguments = tensors(spec)
    found = able("linear_logprob", arguments[0], options=spec.in_use())
    names = [record.name for record in found]
    flops = 2 * spec.rows * spec.width * spec.vocabulary
    result = {"errors": checked(bind_logprob, small, names)}
    result["times"] = timings(bind_logprob, spec, names, arguments)
    result["times"]["matmul alone"] = timed(lambda x, w: x @ w.T, arguments)
    if importlib.util.find_spec("liger_kernel") and DEVICE == "cuda":
        result["times"]["liger"] = attempt(lambda: timed(liger(spec), arguments))
    harness.with_flops(result["times"], flops, backward=2.0)
    with_ratios(result["times"], "both_ms")
    return result


def liger(spec):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels = torch.from_numpy(spec.places()).long().to(DEVICE)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, head: loss(head, hidden / spec.temperature, labels)


def linear_sample(tiny):
    small = dataclasses.replace(
        sample_specs.BENCHMARK, rows=200, width=128, vocabulary=3000
    )
    spec = small if tiny else sample_specs.BENCHMARK
    uniform = torch.from_numpy(spec.places()).to(DEVICE)
    result = {"same_tokens": {}, "times": {}}
    exact = load("linear_sample", "reference")(
        *tensors(small, torch.float64, False), small_uniform(small), **small.options()
    )[0]

    def agreement(run):
        arguments = tensors(small, DTYPE, False)
        found = run(*arguments, small_uniform(small), **small.options())[0]
        return float((found == exact).float().mean())

    def spent(run):
        arguments = tensors(spec, DTYPE, False)
        elapsed = milliseconds(lambda: run(*arguments, uniform, **spec.options()))
        return {
            "forward_ms": elapsed,
            "head_gb_per_s": 2 * spec.vocabulary * spec.width / elapsed / 1e6,
            "tflops": 2 * spec.rows * spec.vocabulary * spec.width / elapsed / 1e9,
        }

    for record in able("linear_sample", uniform, options=spec.in_use()):
        run = record.load()
        result["same_tokens"][record.name] = attempt(agreement, run)
        result["times"][record.name] = attempt(spent, run)
    if DEVICE == "cuda":
        plain = torch.compile(load("linear_sample", "reference"))
        result["times"]["reference, compiled"] = attempt(spent, plain)
    with_ratios(result["times"], "forward_ms")
    return result


def small_uniform(spec):
    return torch.from_numpy(spec.places()).to(DEVICE)


def feature_reward(tiny):
    """Float32, as feature networks give it; 16 samples besides the paper's 4."""
    return {f"{samples} samples": rewards_of(samples, tiny) for samples in (4, 16)}


def rewards_of(samples, tiny):
    spec = dataclasses.replace(reward_specs.BENCHMARK, samples=samples)
    small = dataclasses.replace(spec, batch=1, blocks=3, width=96)
    few = tensors(small, torch.float32, False)
    exact = load("feature_reward", "reference")(*few, **small.options())
    arguments = few if tiny else tensors(spec, torch.float32, False)

    def errors_of(run):
        # Poison, as above.
        torch.full((2**20,), float("nan"), device=DEVICE)
        found = run(*few, **small.options())
        return {k: float((v - exact[k]).abs().max()) for k, v in found.items()}

    def spent(run):
        elapsed = milliseconds(lambda: run(*arguments, **spec.options()))
        read = sum(argument.nbytes for argument in arguments)
        return {"forward_ms": elapsed, "features_gb_per_s": read / elapsed / 1e6}

    result = {"errors": {}, "times": {}}
    for record in able("feature_reward", arguments[0], "float32"):
        run = record.load()
        result["errors"][record.name] = attempt(errors_of, run)
        result["times"][record.name] = attempt(spent, run)
    if DEVICE == "cuda":
        plain = torch.compile(load("feature_reward", "reference"))
        result["times"]["reference, compiled"] = attempt(spent, plain)
    with_ratios(result["times"], "forward_ms")
    return result


SECTIONS = (
    ceilings,
    linear_logprob,
    strided_attention,
    linear_sample,
    feature_reward,
)


def describe():
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    packages = ("torch", "triton", "keras", "keras-hub", "liger-kernel")
    return {"device": DEVICE, "name": name, "versions": harness.versions(*packages)}


def clean():
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    harness.run(__doc__, SECTIONS, describe, clean=clean)
