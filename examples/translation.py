"""EBFT on translation, the paper's third task.

Offline by default: SmolLM2-135M with low-rank adapters, and messages of the programs
installed on this system with their translations. Only tokens of the translation are
learned. The model hardly knows other languages: `--sft-steps` of supervised training
come first, and the features are those of the model before them, as in the paper.

    KERAS_BACKEND=jax python examples/translation.py --config en-de
    KERAS_BACKEND=jax python examples/translation.py --preset gemma3_1b \
        --dataset alma --config de-en --length 512 --rank 0 --batch-size 16 \
        --learning-rate 1e-6 --sft-steps 0 --ce-weight 0.03

Ends with a table of held-out measurements, BLEU and chrF among them, a plot of the
training, and some translations. COMET needs `pip install unbabel-comet` and
`--comet`.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import keras
import numpy as np

import keras_ebft
from keras_ebft.evaluation import TextGenerator, bleu, chrf, comet


def parse_arguments():
    """Settings; the defaults take less than half an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--dataset", default="message_catalogues")
    parser.add_argument("--config", default="en-de", help="pair of languages")
    parser.add_argument("--split", default="train")
    parser.add_argument("--held-out-split", help="default: validation")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="per epoch")
    parser.add_argument("--sft-steps", type=int, default=60, help="before")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument(
        "--whitening", choices=("rollout", "feature", "none"), default="rollout"
    )
    parser.add_argument(
        "--pooling", choices=("last_token", "mean", "concat"), default="mean"
    )
    parser.add_argument("--ce-weight", type=float, default=0.1)
    parser.add_argument("--held-out-samples", type=int, default=4, help="per block")
    parser.add_argument("--held-out-rows", type=int, default=24)
    parser.add_argument("--sentences", type=int, default=32, help="to translate")
    parser.add_argument("--comet", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


def load_pairs(arguments, split):
    """Pairs of source and translation."""
    return keras_ebft.data.load(
        arguments.dataset,
        split=split,
        config=arguments.config,
        data_dir=str(arguments.cache / "data"),
    )


def spread(rows, count):
    """Some rows from all over the data, as a dict of arrays."""
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return {name: values[chosen] for name, values in rows.arrays.items()}


def choose_sentences(held_out, tokenizer, longest, count):
    """Some held-out pairs that fit the model, from all over the data."""
    short = [
        pair
        for pair in held_out
        if sum(len(tokenizer(text)) for text in pair) < longest
    ]
    chosen = np.linspace(0, len(short) - 1, min(count, len(short))).astype(int)
    return [short[index] for index in chosen]


def translate(generate, pairs, with_comet):
    """Translations of the sources, and how good they are."""
    sources, references = zip(*pairs)
    found = [texts[0] for texts in generate(list(sources))]
    values = {"bleu": bleu(found, references), "chrf": chrf(found, references)}
    if with_comet:
        values["comet"] = comet(sources, found, references)
    return found, values


def make_optimizer(learning_rate, steps):
    """Falling to zero, so that the last steps' noise does not stay in the weights."""
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    return keras.optimizers.AdamW(
        schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
    )


def report(before, after):
    """A table of held-out measurements."""
    rows = {
        "unbiased_feature_matching_loss": "feature-matching loss",
        "whitened_feature_matching_loss": "  whitened, as in training",
        "alignment": "alignment",
        "ce_loss": "cross-entropy of targets (nats)",
        "perplexity": "perplexity of targets",
        "bleu": "BLEU",
        "chrf": "chrF",
        "comet": "COMET",
    }
    print(f"\n{'held-out':32}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in rows.items():
        if name not in before:
            continue
        change = after[name] - before[name]
        print(f"{label:32}{before[name]:10.4f}{after[name]:10.4f}{change:+10.4f}")


def main():
    """Fine-tunes and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    start = time.monotonic()
    pairs = load_pairs(arguments, arguments.split)
    held_out = load_pairs(arguments, arguments.held_out_split or "validation")
    causal_lm = base_model.load(arguments, [s + t for s, t in pairs])
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(pairs, tokenizer, arguments.length).load()
    print(rows.report)
    validation = spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )
    longest = arguments.length - 2  # start and end token
    sentences = choose_sentences(held_out, tokenizer, longest, arguments.sentences)
    generate = TextGenerator(
        causal_lm, max_length=arguments.length, batch_size=len(sentences)
    )

    # The paper's settings for translation.
    sampler = keras_ebft.BlockSampler(
        rollout_length=4,
        stride=2,
        context_length=4,
        temperature=arguments.temperature,
    )
    model = keras_ebft.EBFTModel(
        causal_lm,
        sampler,
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        reward=keras_ebft.FeatureMatchingReward(
            whitening=None if arguments.whitening == "none" else arguments.whitening
        ),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )
    # After the model for EBFT, whose frozen network so is the one before.
    if arguments.sft_steps:
        sft = keras_ebft.EBFTModel.sft(causal_lm, seed=arguments.seed)
        sft.compile(make_optimizer(arguments.learning_rate, arguments.sft_steps))
        sft.fit(
            rows.py_dataset(arguments.batch_size, seed=arguments.seed + 1),
            steps_per_epoch=arguments.sft_steps,
        )
    model.compile(
        make_optimizer(arguments.learning_rate, arguments.epochs * arguments.steps)
    )

    # More rollouts than in training, and the same random numbers every time.
    feature_matching = keras_ebft.evaluation.FeatureMatching(
        model,
        rollout_lengths=(model.sampler.rollout_length,),
        num_samples=arguments.held_out_samples,
        seed=arguments.seed,
    )

    def measure(_=None):
        values = feature_matching(validation, batch_size=arguments.batch_size)
        return {name.partition("@")[0]: value for name, value in values.items()}

    before = measure()
    translations_before, quality_before = translate(
        generate, sentences, arguments.comet
    )
    history = model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        epochs=arguments.epochs,
        steps_per_epoch=arguments.steps,
        callbacks=[keras_ebft.callbacks.Measure(measure)],
    )
    after = {name: history.history[f"val_{name}"][-1] for name in before}
    translations_after, quality_after = translate(generate, sentences, arguments.comet)
    report({**before, **quality_before}, {**after, **quality_after})
    for (source, target), *found in zip(
        sentences[:3], translations_before, translations_after
    ):
        for label, text in zip(
            ("source", "target", "before", "after"), (source, target, *found)
        ):
            print(f"{label}: {text.strip()}")
        print()

    figure = keras_ebft.plots.training_curves(
        {"EBFT": history},
        metrics=("unbiased_feature_matching_loss", "ce_loss"),
        before={"EBFT": before},
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "translation.png", dpi=120)
    print(f"\nPlot: {arguments.output / 'translation.png'}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
