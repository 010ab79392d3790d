"""Memory of full fine-tuning, LoRA, and LoRA on a quantized base.

    KERAS_BACKEND=jax python benchmarks/adapter_memory.py

Each way runs in a process of its own: a bfloat16 Llama is built, prepared and
trained for one step. Printed are the bytes of its variables (exact, the same on
every backend) and how far the process's resident memory grew from before the model
was built to after the step, what was free handed back, and at its highest.

On PyTorch Keras runs adapters on quantized layers under mixed policies only, whose
other variables are float32: there LoRA alone is run so, too.
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys

WAYS = ("full", "LoRA", "int8 + LoRA", "int4 + LoRA")
MIXED = ", mixed_bfloat16"
WAYS_ON_TORCH = (
    *WAYS[:2],
    *(way + MIXED for way in WAYS[1:]),
)
CONFIG = {
    "vocabulary_size": 16384,
    "num_layers": 12,
    "num_query_heads": 12,
    "num_key_value_heads": 4,
    "hidden_dim": 768,
    "intermediate_dim": 2048,
    "tie_word_embeddings": True,
}
RANK = 16
MIB = 2**20


def resident():
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(way):
    """Builds, trains one step and returns what was measured."""
    import keras
    import keras_hub
    import numpy as np

    import keras_ebft

    before = resident()
    policy = "mixed_bfloat16" if way.endswith(MIXED) else "bfloat16"
    backbone = keras_hub.models.LlamaBackbone(**CONFIG, dtype=policy)
    causal_lm = keras_hub.models.LlamaCausalLM(backbone)
    if "int" in way:
        causal_lm.quantize(
            way.split()[0],
            filters=lambda layer: isinstance(
                layer, (keras.layers.Dense, keras.layers.EinsumDense)
            ),
        )
    if "LoRA" in way:
        backbone.enable_lora(RANK)
    model = keras_ebft.EBFTModel(causal_lm, seed=0)
    model.compile(keras.optimizers.AdamW(1e-6))
    x = np.random.default_rng(0).integers(0, CONFIG["vocabulary_size"], (1, 64))
    model.fit(x, batch_size=1, verbose=0)

    def size(variables):
        found = {id(v): v for v in variables}.values()
        dtypes = [str(v.dtype) for v in found]
        widths = [2 if "float16" in d else 1 if "int8" in d else 4 for d in dtypes]
        return sum(int(np.prod(v.shape)) * w for v, w in zip(found, widths))

    gc.collect()
    # What was used and freed, the C library may still hold.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    frozen = [v for m in model.frozen_networks for v in m.variables]
    own = {id(v) for v in causal_lm.variables}
    return {
        "policy": size(causal_lm.variables),
        "frozen copy": size(v for v in frozen if id(v) not in own),
        "optimizer": size(model.optimizer.variables),
        "resident": resident() - before,
        "peak": peak - before,
    }


def main():
    if len(sys.argv) > 1:
        print(json.dumps(run(sys.argv[1])))
        return
    columns = ("policy", "frozen copy", "optimizer", "resident", "peak")
    print(f"| MiB | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    on_torch = os.environ.get("KERAS_BACKEND") == "torch"
    for way in WAYS_ON_TORCH if on_torch else WAYS:
        done = subprocess.run(
            [sys.executable, __file__, way], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{found[name] / MIB:.0f}" for name in columns]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
