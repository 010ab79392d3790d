"""Audits the rewards of a real model on files of the standard library.

    KERAS_BACKEND=torch python benchmarks/reward_audit.py [--preset NAME] [--out FOLDER]

Without `--preset` the model is `keras_ebft.models.smollm2()`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_ebft
from keras_ebft.data.builders.standard_library import read_source, source_files


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help="of KerasHub")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the picture and numbers")
    return parser.parse_args()


def cut_rows(tokenizer, count, length, seed):
    """One row of tokens from a random line onwards, each of another file."""
    choose = random.Random(seed)
    paths = [path for _, path in source_files(with_tests=False)]
    choose.shuffle(paths)
    rows = []
    for path in paths:
        lines = (read_source(path) or "").splitlines(keepends=True)
        first = choose.randrange(max(len(lines) - length // 10, 1))
        tokens = list(tokenizer("".join(lines[first : first + length])))
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == count:
            return np.array(rows, dtype="int32")
    raise ValueError(
        f"Expected {count} files of {length} tokens. Received: {len(rows)}. Ask for "
        "fewer or shorter rows."
    )


def load(preset):
    if preset is None:
        from keras_ebft.models import smollm2

        return smollm2()
    return keras_hub.models.CausalLM.from_preset(preset)


def main():
    arguments = read_arguments()
    started = time.monotonic()
    causal_lm = load(arguments.preset)
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = cut_rows(tokenizer, arguments.rows, arguments.length, arguments.seed)
    print(f"Model and rows: {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    model = keras_ebft.EBFTModel(
        causal_lm, keras_ebft.BlockSampler(stride=arguments.stride), seed=0
    )
    audit = keras_ebft.evaluation.RewardAudit(model, seed=arguments.seed)
    result = audit(rows, batch_size=arguments.batch_size)
    seconds = time.monotonic() - started
    print(result)
    print(f"\n{keras.backend.backend()}, audit: {seconds:.0f} s")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        found = json.dumps(result.to_dict(), indent=1)
        (arguments.out / "reward_audit.json").write_text(found)
        figure = keras_ebft.plots.reward_audit(result)
        figure.savefig(arguments.out / "reward_audit.png", dpi=150)


if __name__ == "__main__":
    main()
