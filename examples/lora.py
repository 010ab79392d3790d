"""EBFT through low-rank adapters on a folder of one's own: a small file to keep.

Offline by default: SmolLM2-135M and the standard library. With a folder and a bigger
model:

    KERAS_BACKEND=jax python examples/lora.py
    KERAS_BACKEND=jax python examples/lora.py --preset gemma3_1b \
        --folder my_project --pattern "*.py" --length 512 --rank 16 \
        --learning-rate 1e-5

Only the adapters of the query and value projections are trained and saved. Ends
with a table of held-out measurements, a plot and a completion.
"""

import argparse
import os
import platform
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import keras
import settings
from progress import Progress

import keras_ebft
from keras_ebft.evaluation import PairedFeatureMatching

WITHOUT_TESTS = f"{platform.python_version()}-without_tests"
PROMPT = "def __init__(self, name):\n"


def parse_arguments():
    """Settings; the defaults take about a quarter of an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--folder", type=Path, help="text files to learn from")
    parser.add_argument("--pattern", default="*.py", help="which files of the folder")
    settings.add_training_arguments(
        parser, length=96, batch_size=2, steps=40, held_out_rows=32
    )
    settings.add_method_arguments(parser)
    return parser.parse_args()


def load_texts(arguments):
    """Texts to learn from, and held-out ones."""
    if arguments.folder:
        texts = list(keras_ebft.data.TextFiles(arguments.folder, arguments.pattern))
        return texts[len(texts) // 10 :], texts[: max(len(texts) // 10, 1)]
    options = {"config": WITHOUT_TESTS, "data_dir": str(arguments.cache / "data")}
    return (
        keras_ebft.data.load("python_source", split=split, **options)
        for split in ("train", "validation")
    )


def main():
    """Fine-tunes adapters and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    keras_ebft.use_compilation_cache()
    progress = Progress()
    progress("Loading")
    texts, held_out = load_texts(arguments)
    # Adapters first: the frozen network is then the same weights without them.
    causal_lm = base_model.load(arguments, list(texts))
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    validation = changes.spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )

    sampler = keras_ebft.BlockSampler(temperature=arguments.temperature)
    model = settings.build_model(causal_lm, sampler, arguments)
    model.compile(settings.make_optimizer(arguments.learning_rate, arguments.steps))
    progress("Measuring before")
    measure = PairedFeatureMatching(
        model, validation, num_samples=arguments.held_out_samples
    )
    before = measure()
    progress("EBFT")
    model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        steps_per_epoch=arguments.steps,
    )
    progress("Measuring after EBFT")
    after = {"EBFT": measure()}
    changes.report(before, after)
    changes.plot(before, after, arguments.output / "lora.png")

    adapters = arguments.output / "adapters.lora.h5"
    causal_lm.backbone.save_lora_weights(str(adapters))
    generate = keras_ebft.evaluation.TextGenerator(causal_lm, max_length=64)
    print(f"\n{PROMPT}{generate([PROMPT])[0][0]}")
    print(f"\nPlot: {arguments.output / 'lora.png'}")
    print(f"Adapters: {adapters}, {adapters.stat().st_size / 1024:.0f} KiB")
    progress.end()


if __name__ == "__main__":
    main()
