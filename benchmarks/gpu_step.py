"""A whole training step in bfloat16 on an accelerator, ours or the authors'.

    KERAS_BACKEND=jax python benchmarks/gpu_step.py step.json --shape 1b
    python benchmarks/gpu_step.py step.json --shape 1b --reference <checkout>

Random weights in the shapes of SmolLM2-135M and of a Llama of one billion parameters.
Ours goes through `fit`, with unproven kernels as they qualify or, with `--kernels off`,
without them. Theirs runs phase by phase, as `compare.py` runs it, with PyTorch's fused
attention. Utilisation is the share of the rate of a matrix product that is measured in
the same process. `--tiny` runs the same code at a toy size, on a CPU too.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import harness

SHAPES = {
    "1b": {
        "vocabulary_size": 128256,
        "num_layers": 16,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
        "hidden_dim": 2048,
        "intermediate_dim": 8192,
    },
    "smollm2": {
        "vocabulary_size": 49152,
        "num_layers": 30,
        "num_query_heads": 9,
        "num_key_value_heads": 3,
        "hidden_dim": 576,
        "intermediate_dim": 1536,
    },
    "tiny": {
        "vocabulary_size": 500,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 64,
        "intermediate_dim": 96,
    },
}
WARM_UP = 2


def shape_of(arguments):
    """As `step.DEFAULTS`, with the paper's geometry."""
    return {
        "length": 64 if arguments.tiny else arguments.length,
        "batch": arguments.batch,
        "samples": 4,
        "rollout": 8,
        "stride": 8,
        "context": 8,
        "dtype": "bfloat16",
    }


def config_of(arguments):
    """Of the model, as `harness.make_model` takes it."""
    return {**SHAPES["tiny" if arguments.tiny else arguments.shape]}


def model_flops(shape, config):
    """Operations of a step's matrix products, without what is computed again.

    Gradients compute the head's logits a second time to save their memory, which
    `keras_ebft.estimates.work` counts and a rate of useful operations may not.
    """
    work = harness.work_of(shape, {**config, "tie_word_embeddings": True})
    blocks = (shape["length"] - shape["context"]) // shape["stride"]
    generated = shape["batch"] * blocks * shape["samples"] * shape["rollout"]
    return work.total - 2 * generated * config["vocabulary_size"] * config["hidden_dim"]


def product_rate(tiny):
    """What the device's largest matrix products reach, in operations per second."""
    import keras

    from keras_ebft.backend.measuring import milliseconds

    size = 64 if tiny else 8192
    one, two = (
        keras.random.normal((size, size), dtype="bfloat16", seed=i) for i in (0, 1)
    )
    spent = milliseconds({"product": lambda: keras.ops.matmul(one, two)})["product"]
    return 2e3 * size**3 / spent


def memory():
    """Most of the device's memory that was ever taken, GiB; `None` on a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        found = jax.local_devices()[0].memory_stats() or {}
        peak = found.get("peak_bytes_in_use")
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return peak and peak / 2**30


def run_own(shape, config, repeats):
    """Seconds of every step through `fit`, and which kernels ran."""
    import keras
    import numpy as np

    from keras_ebft import kernels

    model = harness.make_model(shape, **config, tie_word_embeddings=True)
    random = np.random.default_rng(0)
    size = (shape["batch"] * repeats, shape["length"])
    tokens = random.integers(0, config["vocabulary_size"], size).astype("int32")
    clock = Clock(model)
    with kernels.watch_choices() as choices:
        start = time.perf_counter()
        model.fit(
            tokens, batch_size=shape["batch"], verbose=0, callbacks=[clock.callback()]
        )
        whole = time.perf_counter() - start
    found = {op: sorted(names) for op, names in choices.items()}
    return {
        "seconds": clock.seconds,
        "fit_seconds": whole,
        "kernels": found,
        "backend": keras.backend.backend(),
    }


class Clock:
    """Seconds of every step of a `fit`, the device's work included."""

    def __init__(self, model):
        self.model = model
        self.seconds = []

    def callback(self):
        """A Keras callback that keeps the time."""
        import keras

        from keras_ebft.backend.measuring import wait

        def begin(batch, logs=None):
            self.start = time.perf_counter()

        def end(batch, logs=None):
            # On JAX the logs are what a step returns; on PyTorch they are numbers, and
            # for any tensor all of the device is waited for.
            tensors = [v for v in (logs or {}).values() if keras.ops.is_tensor(v)]
            wait([*tensors, self.model.trainable_variables[0].value])
            self.seconds.append(time.perf_counter() - self.start)

        return keras.callbacks.LambdaCallback(
            on_train_batch_begin=begin, on_train_batch_end=end
        )


def run_reference(checkout, shape, config, repeats, device):
    """Seconds of every step of the authors' code and, of the last, of its phases."""
    import torch
    from compare import PHASES, without_scripts, write_checkpoint
    from reference import ReferenceStep

    # Their masks are made where tensors are made.
    torch.set_default_device(device)
    tokens = harness.random_tokens(shape, config["vocabulary_size"])
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            folder, config, shape["length"], tied=True, dtype=shape["dtype"]
        )
        with without_scripts():
            step = ReferenceStep(checkout, folder, shape, tokens, "sdpa", device)

    seconds = []
    for _ in range(repeats):
        phases, clock = {}, [time.perf_counter()]

        def done(value, phases=phases, clock=clock):
            if device == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())
            phases[PHASES[len(phases)]] = clock[-1] - clock[-2]
            return value

        sequences = done(step.rollout())
        features = done(step.features(sequences))
        advantages = done(step.rewards(*features))
        done(step.policy(sequences, advantages))
        done(step.update())
        seconds.append(clock[-1] - clock[0])
    return {"seconds": seconds, "phases": phases}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=("1b", "smollm2"), default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--kernels", choices=("automatic", "off"), default="automatic")
    parser.add_argument("--reference", type=Path, help="theirs, from this checkout")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.reference:
        os.environ["KERAS_BACKEND"] = "torch"
    if arguments.kernels == "off":
        os.environ["KERAS_EBFT_KERNELS"] = "off"

    shape, config = shape_of(arguments), config_of(arguments)
    rate = product_rate(arguments.tiny)
    if arguments.reference:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        checkout = arguments.reference.resolve()
        found = run_reference(checkout, shape, config, arguments.steps, device)
    else:
        found = run_own(shape, config, arguments.steps)
    seconds = statistics.median(found["seconds"][WARM_UP:])
    flops = model_flops(shape, config)
    found |= {
        "seconds_per_step": seconds,
        "documents_per_second": shape["batch"] / seconds,
        "model_tflops_per_step": flops / 1e12,
        "matrix_product_tflops": rate / 1e12,
        "model_flop_utilisation": flops / seconds / rate,
        "peak_gib": memory(),
        "shape": shape,
        "config": config,
        "versions": harness.machine(),
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
