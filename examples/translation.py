"""EBFT on translation, the paper's third task.

Offline by default: SmolLM2-135M with low-rank adapters, and messages of the programs
installed on this system with their translations; on Debian `apt install
libreoffice-l10n-de` alone brings thousands. Only tokens of the translation are learned.
The model hardly knows other languages: `--sft-steps` of supervised training come
first, and the features are those of the model before them, as in the paper.

    KERAS_BACKEND=jax python examples/translation.py --config en-de
    KERAS_BACKEND=jax python examples/translation.py --preset gemma3_1b \
        --dataset alma --config de-en --length 512 --rank 0 --batch-size 16 \
        --learning-rate 1e-6 --sft-steps 0 --ce-weight 0.03

From that start EBFT goes on, and beside it supervised training for as many steps. Ends
with some translations, BLEU, a table of held-out measurements with their noise, chrF
among them, and a picture of the changes. COMET needs `pip install unbabel-comet` and
`--comet`.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import keras
import numpy as np
import settings
from progress import Progress

import keras_ebft
from keras_ebft.evaluation import (
    PairedFeatureMatching,
    TextGenerator,
    bleu,
    chrf,
    comet,
)


def parse_arguments():
    """Settings; the defaults take less than half an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    settings.add_data_arguments(parser, dataset="message_catalogues", config="en-de")
    settings.add_training_arguments(
        parser, length=64, batch_size=4, steps=40, held_out_rows=48
    )
    settings.add_method_arguments(parser, pooling="mean")
    parser.add_argument("--sft-steps", type=int, default=80, help="before both")
    parser.add_argument("--least-words", type=int, default=4, help="of a source")
    parser.add_argument("--sentences", type=int, default=64, help="to translate")
    parser.add_argument("--comet", action="store_true")
    return parser.parse_args()


def load_pairs(arguments, split):
    """Pairs of source and translation; the shortest say nothing of a language."""
    pairs = keras_ebft.data.load(
        arguments.dataset,
        split=split,
        config=arguments.config,
        data_dir=str(arguments.cache / "data"),
    )
    return [pair for pair in pairs if len(pair[0].split()) >= arguments.least_words]


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
    """Translations of the sources; chrF of each, as an array, and scores of all."""
    sources, references = zip(*pairs)
    found = [texts[0] for texts in generate(list(sources))]
    of_each = [chrf([text], [target]) for text, target in zip(found, references)]
    scores = {"BLEU": bleu(found, references)}
    if with_comet:
        scores["COMET"] = comet(sources, found, references)
    return found, {"chrf": np.array(of_each)}, scores


def show(sentences, translations, scores):
    """Three sources and what became of them; scores of all translations together."""
    for index, (source, target) in enumerate(sentences[:3]):
        print(f"\nsource: {source.strip()}\ntarget: {target.strip()}")
        for name, texts in translations.items():
            print(f"{name}: {texts[index].strip()}")
    for name in next(iter(scores.values())):
        values = (f"{when} {found[name]:.2f}" for when, found in scores.items())
        print(f"\n{name} of {len(sentences)} sentences: {', '.join(values)}")


def main():
    """Fine-tunes and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    keras_ebft.use_compilation_cache()
    progress = Progress()
    progress("Loading")
    pairs = load_pairs(arguments, arguments.split)
    held_out = load_pairs(arguments, arguments.held_out_split)
    causal_lm = base_model.load(arguments, [s + t for s, t in pairs])
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(pairs, tokenizer, arguments.length).load()
    print(rows.report)
    validation = changes.spread(
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
    model = settings.build_model(causal_lm, sampler, arguments)
    translations, scores = {}, {}

    def chrf_after(name):
        progress(f"Translating: {name}")
        translations[name], of_each, scores[name] = translate(
            generate, sentences, arguments.comet
        )
        return of_each

    def train(name, method, steps, seed):
        method.compile(settings.make_optimizer(arguments.learning_rate, steps))
        progress(name)
        batches = rows.py_dataset(arguments.batch_size, seed=seed)
        method.fit(batches, steps_per_epoch=steps)

    chrf_after("bare model")
    # After the model for EBFT, whose frozen network so is the one before.
    sft = keras_ebft.EBFTModel.sft(causal_lm, seed=arguments.seed)
    if arguments.sft_steps:
        train("SFT at first", sft, arguments.sft_steps, arguments.seed + 1)
    # On rollouts of what both methods start from.
    progress("Measuring the start")
    feature_matching = PairedFeatureMatching(
        model, validation, num_samples=arguments.held_out_samples, seed=arguments.seed
    )
    before, after = {**feature_matching(), **chrf_after("start")}, {}
    trained = causal_lm.trainable_variables
    start = [np.array(keras.ops.convert_to_numpy(variable)) for variable in trained]
    for name, method in {"EBFT": model, "SFT": sft}.items():
        for variable, array in zip(trained, start):
            variable.assign(array)
        train(name, method, arguments.steps, arguments.seed)
        progress(f"Measuring after {name}")
        after[name] = {**feature_matching(), **chrf_after(f"after {name}")}

    show(sentences, translations, scores)
    labels = {**changes.MEASURES, "chrf": "chrF of a sentence"}
    changes.report(before, after, labels)
    picture = arguments.output / "translation.png"
    changes.plot(before, after, picture, labels)
    print(f"\nPlot: {picture}")
    progress.end()


if __name__ == "__main__":
    main()
