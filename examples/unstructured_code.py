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
those of the training and for others, and a picture of the changes.
"""

import argparse
import os
import platform

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import keras
import settings
from progress import Progress

import keras_ebft
from keras_ebft.evaluation import PairedFeatureMatching

WITHOUT_TESTS = f"{platform.python_version()}-without_tests"


def parse_arguments():
    """Settings; the defaults take four to ten minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    settings.add_data_arguments(parser, dataset="python_source")
    settings.add_training_arguments(
        parser, length=96, batch_size=2, steps=40, held_out_rows=32
    )
    settings.add_method_arguments(parser)
    parser.add_argument("--held-out-stride", type=int, default=16)
    parser.add_argument("--rollout-lengths", type=int, nargs="+", default=[4, 8])
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


def make_sampler(arguments, **sampling):
    """The paper's sampler, or another one to measure with."""
    return keras_ebft.BlockSampler(temperature=arguments.temperature, **sampling)


def measures_of(causal_lm, rows, arguments):
    """What measures held-out rows, for every rollout length."""
    return {
        length: PairedFeatureMatching(
            settings.build_model(
                causal_lm,
                make_sampler(
                    arguments,
                    rollout_length=length,
                    stride=arguments.held_out_stride,
                ),
                arguments,
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
    held_out = load_texts(arguments, arguments.held_out_split)
    causal_lm = base_model.load(arguments, list(texts))
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    print(rows.report)
    validation = changes.spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )

    model = settings.build_model(causal_lm, make_sampler(arguments), arguments)
    model.compile(settings.make_optimizer(arguments.learning_rate, arguments.steps))
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
    labels = labels_of(arguments.rollout_lengths)
    before, after = named(before), {"EBFT": named(after)}
    changes.report(before, after, labels)
    picture = arguments.output / "unstructured_code.png"
    changes.plot(before, after, picture, labels)
    print(f"\nPlot: {picture}")
    progress.end()


if __name__ == "__main__":
    main()
