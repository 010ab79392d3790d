"""The demo with several seeds: what EBFT and SFT change on held-out files.

    KERAS_BACKEND=jax python benchmarks/quickstart_seeds.py --seeds 0 1 2 --out FILE

Settings are the demo's (`examples/quickstart.py`), and so is what is measured; a seed
decides the adapters, the order of the rows and the rollouts. Lines are added to the
file as they are measured, and a run that is started again goes on where it ended.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import changes
import keras
import numpy as np
import quickstart
from harness import machine

import keras_ebft
from keras_ebft.evaluation import PairedFeatureMatching, paired_change


def read_arguments():
    """The demo's arguments, and which seeds and methods."""
    parser = quickstart.make_parser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["EBFT", "SFT"])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def done(path):
    """Which methods, rates and seeds a file has, of this backend."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {
        (run["method"], run["learning_rate"], run["seed"])
        for run in map(json.loads, lines)
        if run["backend"] == keras.backend.backend()
    }


def draw_adapters(causal_lm, seed):
    """New adapters: A as Keras draws it, B of zeros."""
    for index, variable in enumerate(causal_lm.trainable_variables):
        zero = variable.path.endswith("lora_kernel_b")
        draw = keras.initializers.HeUniform(seed=seed * 1000 + index)
        variable.assign(np.zeros(variable.shape) if zero else draw(variable.shape))


def train(method, causal_lm, rows, arguments):
    """Trains once; returns seconds."""
    if method == "SFT":
        model = keras_ebft.EBFTModel.sft(causal_lm, seed=arguments.seed)
    else:
        model = quickstart.build_model(causal_lm, arguments, arguments.stride)
    start = time.monotonic()
    quickstart.train(model, rows, arguments)
    return time.monotonic() - start


def summary(before, after):
    """What `paired_change` says of every measure: `[mean, half of its interval]`."""
    return {
        name: list(paired_change(before[name], after[name]))
        for name in changes.MEASURES
    }


def main():
    """Measures, and adds a line for every method and seed."""
    arguments = read_arguments()
    known = done(arguments.out)
    keras.utils.set_random_seed(0)
    causal_lm, training, held_out = quickstart.prepare(arguments)
    draw_adapters(causal_lm, 0)
    measure = PairedFeatureMatching(
        quickstart.build_model(causal_lm, arguments, arguments.held_out_stride),
        held_out,
        num_samples=arguments.held_out_samples,
    )
    before = measure()
    for seed in arguments.seeds:
        arguments.seed = seed
        rows = np.random.default_rng(seed).permutation(training)
        for method in arguments.methods:
            if (method, arguments.learning_rate, seed) in known:
                continue
            draw_adapters(causal_lm, seed)
            seconds = train(method, causal_lm, rows, arguments)
            after = measure()
            line = {
                "backend": keras.backend.backend(),
                "method": method,
                "seed": seed,
                "learning_rate": arguments.learning_rate,
                "pooling": arguments.pooling,
                "steps": arguments.steps,
                "seconds": round(seconds, 1),
                "effective_samples": round(measure.effective_samples, 3),
                "before": {name: float(before[name].mean()) for name in before},
                "change": summary(before, after),
                "machine": machine(),
            }
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
