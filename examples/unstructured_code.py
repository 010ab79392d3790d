"""EBFT on plain source code, the paper's second task: no prompts, no answers.

Offline by default: SmolLM2-135M with low-rank adapters, and the Python standard
library of the running interpreter.

    KERAS_BACKEND=jax python examples/unstructured_code.py
    KERAS_BACKEND=jax python examples/unstructured_code.py \
        --preset qwen2.5_coder_1.5b --dataset swallowcode \
        --split "train[:1%]" --held-out-split "train[-1%:]" --length 1024 \
        --rank 0 --batch-size 16 --learning-rate 1e-6 --ce-weight 0.03

The second command has the paper's settings; adapters want a higher learning rate.
`--model micro` runs without the package of the weights and means nothing.

Ends with a table of held-out measurements with their noise, for rollouts as long as
those of the training and for others, and a plot of the feature-matching loss against
rollout length, before and after.
"""

import argparse
import os
import platform
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import keras
from progress import Progress

import keras_ebft
from keras_ebft.evaluation import PairedFeatureMatching

WITHOUT_TESTS = f"{platform.python_version()}-without_tests"


def parse_arguments():
    """Settings; the defaults take about a quarter of an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--dataset", default="python_source")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--held-out-split", help="default: validation")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument(
        "--whitening", choices=("rollout", "feature", "none"), default="rollout"
    )
    parser.add_argument(
        "--pooling", choices=("last_token", "mean", "concat"), default="last_token"
    )
    parser.add_argument("--ce-weight", type=float, default=0.1)
    parser.add_argument("--held-out-samples", type=int, default=4, help="per block")
    parser.add_argument("--held-out-rows", type=int, default=32)
    parser.add_argument("--held-out-stride", type=int, default=16)
    parser.add_argument("--rollout-lengths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


def load_texts(arguments, split):
    """Documents of the data set."""
    config = arguments.config
    if arguments.dataset == "python_source":
        config = config or WITHOUT_TESTS
    folder = str(arguments.cache / "data")
    return keras_ebft.data.load(
        arguments.dataset, split=split, config=config, data_dir=folder
    )


def build_model(causal_lm, arguments, **sampling):
    """The model that `fit` trains, or one that measures with another sampler."""
    return keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(temperature=arguments.temperature, **sampling),
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        reward=keras_ebft.FeatureMatchingReward(
            whitening=None if arguments.whitening == "none" else arguments.whitening
        ),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )


def measures_of(causal_lm, rows, arguments):
    """What measures held-out rows, for every rollout length."""
    return {
        length: PairedFeatureMatching(
            build_model(
                causal_lm,
                arguments,
                rollout_length=length,
                stride=arguments.held_out_stride,
            ),
            rows,
            num_samples=arguments.held_out_samples,
            seed=arguments.seed,
        )
        for length in arguments.rollout_lengths
    }


def named(measured):
    """One dict of what was measured with every rollout length, `name@length`."""
    return {
        f"{name}@{length}": values
        for length, of_length in measured.items()
        for name, values in of_length.items()
    }


def labels_of(lengths):
    """What the table calls each measure; the cross-entropy knows no rollouts."""
    *of_rollouts, likelihood = changes.MEASURES.items()
    labels = {
        f"{name}@{length}": f"{label}, {length}"
        for name, label in of_rollouts
        for length in lengths
    }
    return {**labels, f"{likelihood[0]}@{lengths[0]}": likelihood[1]}


def main():
    """Fine-tunes and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    keras_ebft.use_compilation_cache()
    progress = Progress()
    progress("Loading")
    texts = load_texts(arguments, arguments.split)
    held_out = load_texts(arguments, arguments.held_out_split or "validation")
    causal_lm = base_model.load(arguments, list(texts))
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    print(rows.report)
    validation = changes.spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )

    model = build_model(causal_lm, arguments)
    # Falling to zero, so that the last steps' noise does not stay in the weights.
    schedule = keras.optimizers.schedules.CosineDecay(
        arguments.learning_rate, arguments.steps
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
        )
    )
    progress("Measuring before")
    measures = measures_of(causal_lm, validation, arguments)
    before = {length: measure() for length, measure in measures.items()}
    progress("EBFT")
    model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        steps_per_epoch=arguments.steps,
    )
    progress("Measuring after EBFT")
    after = {length: measure() for length, measure in measures.items()}
    changes.report(
        named(before), {"EBFT": named(after)}, labels_of(arguments.rollout_lengths)
    )

    figure = keras_ebft.plots.rollout_length_curves(
        {
            name: {g: m["feature_matching_loss"].mean() for g, m in measured.items()}
            for name, measured in (("before", before), ("after", after))
        },
        label="held-out feature-matching loss",
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "unstructured_code.png", dpi=120)
    print(f"\nPlot: {arguments.output / 'unstructured_code.png'}")
    progress.end()


if __name__ == "__main__":
    main()
