"""Several samples of every prompt on SmolLM2: one reading shared, or each its own.

    KERAS_BACKEND=jax python benchmarks/prompt_samples.py [--results prompt_samples]

Both ways are `evaluation.TextGenerator`'s: block-parallel sampling, which reads a
prompt once for all of its samples, and KerasHub's `generate`, which is given the prompt
as often as samples are wanted. In one run, first calls aside.
"""

import argparse
import os
import sys
import time
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from harness import table, write_results

import keras_ebft
from keras_ebft.evaluation import TextGenerator, generation

PROMPTS = [
    f"def solve_{index}(values):\n"
    + '    """'
    + "Sum of what is given. " * 12
    + '"""\n'
    for index in range(4)
]
WAYS = {"shared reading": True, "generate": False}


def seconds_of(generate, repeats):
    """Of the first call, and the least of later ones."""
    times = []
    for _ in range(repeats + 1):
        start = time.monotonic()
        generate(PROMPTS)
        times.append(time.monotonic() - start)
    return times[0], min(times[1:])


def main():
    """Prints, and adds to the results, a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--results", help="beginning of a file name in benchmarks/results"
    )
    arguments = parser.parse_args()
    causal_lm = keras_ebft.models.smollm2(sequence_length=256)
    tokenizer = causal_lm.preprocessor.tokenizer
    prompt_tokens = max(len(tokenizer(prompt)) for prompt in PROMPTS)
    rows = []
    for way, shares in WAYS.items():
        generate = TextGenerator(
            causal_lm,
            max_length=prompt_tokens + arguments.new_tokens,
            num_samples=arguments.samples,
            temperature=0.6,
            batch_size=len(PROMPTS) * arguments.samples,
        )
        with mock.patch.object(generation, "can_share_prompts", return_value=shares):
            first, later = seconds_of(generate, arguments.repeats)
        tokens = len(PROMPTS) * arguments.samples * arguments.new_tokens
        rows.append([way, f"{first:.1f}", f"{later:.1f}", f"{tokens / later:.1f}"])
        print(rows[-1], flush=True)
    text = table(["way", "first call (s)", "later (s)", "tokens per second"], rows)
    if arguments.results:
        shape = (
            f"{len(PROMPTS)} prompts of {prompt_tokens} tokens, {arguments.samples} "
            f"samples each of up to {arguments.new_tokens} tokens."
        )
        backend = keras.backend.backend()
        command = f"KERAS_BACKEND={backend} python {' '.join(sys.argv)}"
        name = f"{arguments.results}_{backend}"
        write_results(name, command, f"{shape}\n\n{text}", rows)
    else:
        print(text)


if __name__ == "__main__":
    main()
