"""What the benchmarks share: a model, batches, clocks, memory, the machine.

The library itself never branches on the backend; measuring has to, because each
framework compiles, waits and differentiates in its own way.
"""

import datetime
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20

# The model of the project's reference measurements.
LLAMA = {
    "vocabulary_size": 8192,
    "num_layers": 8,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 256,
    "intermediate_dim": 704,
    "tie_word_embeddings": False,
}


DECODER_SIZES = (
    "vocabulary_size",
    "num_layers",
    "hidden_dim",
    "intermediate_dim",
    "num_query_heads",
    "num_key_value_heads",
)


def make_model(shape, **config):
    """A compiled `EBFTModel` on a random Llama.

    Args:
        shape: dict, see `step.DEFAULTS`.
        **config: replaces entries of `LLAMA`.
    """
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        **{**LLAMA, **config}, dtype=shape["dtype"]
    )
    return compiled_model(keras_hub.models.LlamaCausalLM(backbone), shape)


def compiled_model(causal_lm, shape):
    """A compiled `EBFTModel` of a shape; `rematerialize` and `micro_batches` too."""
    import keras

    import keras_ebft

    model = keras_ebft.EBFTModel(
        causal_lm,
        sampler=block_sampler(shape),
        rematerialize=bool(shape.get("rematerialize", 0)),
        micro_batches=shape.get("micro_batches", 1),
        seed=0,
    )
    model.compile(keras.optimizers.AdamW(1e-6, beta_2=0.95, weight_decay=0.0))
    return model


def block_sampler(shape):
    """The `BlockSampler` of a shape."""
    import keras_ebft

    return keras_ebft.BlockSampler(
        rollout_length=shape["rollout"],
        stride=shape["stride"],
        context_length=shape["context"],
        num_samples=shape["samples"],
    )


def work_of(shape, config, rematerialize=False):
    """`keras_ebft.estimates.work` of a step of a Llama.

    Args:
        shape: dict, see `step.DEFAULTS`.
        config: dict, all of what `make_model` takes.
        rematerialize: bool, as in `EBFTModel`.
    """
    import keras_ebft

    sizes = {name: value for name, value in config.items() if name in DECODER_SIZES}
    decoder = keras_ebft.estimates.DecoderShape(
        **sizes,
        head_dim=config["hidden_dim"] // config["num_query_heads"],
        tied=config["tie_word_embeddings"],
    )
    return keras_ebft.estimates.work(
        decoder,
        shape["length"],
        shape["batch"],
        sampler=block_sampler(shape),
        rematerialize=rematerialize,
    )


def random_tokens(shape, vocabulary_size):
    """int32 `[B, T]`."""
    import numpy as np

    generator = np.random.default_rng(0)
    size = (shape["batch"], shape["length"])
    return generator.integers(0, vocabulary_size, size).astype("int32")


def num_bytes(variable):
    """Bytes of a Keras variable, whose dtype ends in its bits."""
    bits = re.search(r"\d+$", variable.dtype)
    return math.prod(variable.shape) * (int(bits.group()) if bits else 8) // 8


class PeakMemory:
    """Highest resident memory of this process within a `with` block, in bytes."""

    def __enter__(self):
        # 5 resets the high-water mark (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_):
        self.peak = _status("VmHWM")


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def measure(function, repeats):
    """Runs a function once to compile it and then `repeats` times.

    Args:
        function: function without arguments; returns when its work is done.
        repeats: int.

    Returns:
        dict: `seconds` (median), `fastest`, `first_call` in seconds, and in bytes
        `peak` (resident memory while repeating), `resident` (before that) and
        `peak_with_compilation`.
    """
    with PeakMemory() as first:
        first_call = _time(function)
    with PeakMemory() as repeated:
        seconds = [_time(function) for _ in range(repeats)]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "first_call": first_call,
        "resident": repeated.before,
        "peak": repeated.peak,
        "peak_with_compilation": max(first.peak, repeated.peak),
    }


def _time(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run_alone(arguments, environment=None, timeout=None):
    """Runs a script in a process of its own; returns the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    """What a number depends on: processor, cores, versions, date."""
    processor = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    packages = ("keras", "keras-hub", "jax", "tensorflow", "torch")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{
            p: metadata.version(p)
            for p in packages
            if importlib.util.find_spec(p.replace("-", "_"))
        },
    }


def table(columns, rows):
    """A Markdown table of strings."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def write_results(name, command, text, found):
    """Writes `results/<name>.json` and `.md`, the command that made them on top."""
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    record = {"command": command, "machine": where, "results": found}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in where.items())
    page = f"`{command}`\n\n{described}\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(page)
    print(page)
