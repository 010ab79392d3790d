"""Memory of a step with rematerialisation and groups of samples.

    KERAS_BACKEND=torch python benchmarks/memory_levers.py

Each setting runs in a process of its own. On PyTorch and TensorFlow (not compiled by
XLA, without oneDNN, whose allocator keeps what it once had), memory is how far the
process's resident memory rose at its highest during a second and third step, over
what it was before them. On JAX it is what the loss keeps
for its gradient, weights included; how much of it a compiled step holds at once, and
what beside it, is XLA's decision.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time

SETTINGS = {
    "neither": {},
    "rematerialize": {"rematerialize": True},
    "micro_batches=2": {"micro_batches": 2},
    "micro_batches=4": {"micro_batches": 4},
    "rematerialize, micro_batches=4": {"rematerialize": True, "micro_batches": 4},
}
CONFIG = {
    "vocabulary_size": 2048,
    "num_layers": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 256,
    "intermediate_dim": 1024,
    "tie_word_embeddings": True,
}
ROWS, LENGTH = 2, 264
MIB = 2**20


def resident():
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches resident memory, which no system call reports for a part of a run."""

    def __init__(self):
        super().__init__(daemon=True)
        gc.collect()
        # What earlier steps used and freed, the C library may still hold.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start_at = self.highest = resident()
        self.watching = True

    def run(self):
        """Notes the highest until stopped."""
        while self.watching:
            self.highest = max(self.highest, resident())
            time.sleep(0.002)

    def stop(self):
        """Bytes it rose to over what it was at first."""
        self.watching = False
        self.join()
        return self.highest - self.start_at


def run(options):
    """Builds a model, trains some steps and returns the bytes they needed."""
    import keras
    import keras_hub
    import numpy as np

    import keras_ebft

    keras.utils.set_random_seed(0)
    causal_lm = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(**CONFIG), preprocessor=None
    )
    model = keras_ebft.EBFTModel(causal_lm, ce_weight=0.1, seed=0, **options)
    random = np.random.default_rng(0)
    x = random.integers(0, CONFIG["vocabulary_size"], (ROWS, LENGTH)).astype("int32")
    if keras.backend.backend() == "jax":
        return measure_jax(model, x)
    model.compile(keras.optimizers.SGD(1e-3), jit_compile=False)
    model.train_on_batch(x)
    peak = Peak()
    peak.start()
    for _ in range(2):
        model.train_on_batch(x)
    return peak.stop()


def measure_jax(model, x):
    """Bytes kept from the loss for its gradient, by tracing alone."""
    import jax
    import keras

    variables = model.variables
    trained = {id(variable) for variable in model.trainable_variables}

    def loss(values, fixed):
        values, fixed = iter(values), iter(fixed)
        mapping = [(v, next(values if id(v) in trained else fixed)) for v in variables]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = model({"token_ids": x, "padding_mask": x >= 0}, training=True)
            return model.compute_loss(y_pred=outputs)

    values = [v.value for v in variables if id(v) in trained]
    fixed = [v.value for v in variables if id(v) not in trained]
    # The function that takes a step's gradient holds what was kept for it.
    kept = jax.eval_shape(lambda values: jax.vjp(loss, values, fixed)[1], values)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def main():
    if len(sys.argv) > 1:
        print(json.dumps(run(SETTINGS[sys.argv[1]])))
        return
    print("| setting | MiB | of neither |\n|---|---|---|")
    first = None
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    for name in SETTINGS:
        done = subprocess.run(
            [sys.executable, __file__, name],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        print(f"| {name} | {found / MIB:.0f} | {found / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
