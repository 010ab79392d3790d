"""EBFT of a Gemma 3 through low-rank adapters: little memory, a small file to keep.

Offline by default: a small Gemma 3 and its tokenizer are first trained on the
Python standard library (cached). With `--preset` the real model:

    KERAS_BACKEND=jax python examples/lora_gemma.py
    KERAS_BACKEND=jax python examples/lora_gemma.py --preset gemma3_1b \
        --folder my_project --pattern "*.py" --length 512 --rank 16 \
        --learning-rate 1e-5

Only the adapters of the query and value projections are trained and saved. Ends
with a table of held-out measurements, a plot and a completion.
"""

import argparse
import hashlib
import io
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import numpy as np
import sentencepiece

import keras_ebft

WITHOUT_TESTS = f"{platform.python_version()}-without_tests"
# Gemma's tokenizers have these whether or not there are images.
GEMMA_SYMBOLS = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<img>",
)
PROMPT = "def __init__(self, name):\n"


def parse_arguments():
    """Settings; the defaults take some minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", help="KerasHub preset instead of a small model")
    parser.add_argument("--folder", type=Path, help="text files to learn from")
    parser.add_argument("--pattern", default="*.py", help="which files of the folder")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="per epoch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--whitening", choices=("rollout", "feature", "none"), default="none"
    )
    parser.add_argument("--ce-weight", type=float, default=0.3)
    parser.add_argument("--held-out-rows", type=int, default=96)
    parser.add_argument("--pretrain-steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--cache", type=Path, default=cache / "keras_ebft")
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


def train_sentence_pieces(texts, vocabulary):
    """A tokenizer as Gemma has them."""
    model = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines()]
    # Lines that SentencePiece chose itself would be others in each run.
    lines = lines[:: len(lines) // 50_000 + 1]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "    ", *GEMMA_SYMBOLS],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
        minloglevel=2,
    )
    return keras_hub.models.Gemma3Tokenizer(proto=model.getvalue())


def small_gemma(tokenizer, arguments):
    """A Gemma 3 that fits a laptop."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        image_size=None,
        num_layers=arguments.layers,
        num_query_heads=4,
        num_key_value_heads=1,
        head_dim=arguments.width // 4,
        hidden_dim=arguments.width,
        intermediate_dim=arguments.width * 4,
        use_query_key_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=64,
    )
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer, sequence_length=arguments.length
    )
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)


def pretrained_gemma(texts, arguments):
    """The small model after next-token prediction; its weights are cached."""
    texts = list(texts)
    tokenizer = train_sentence_pieces(texts, arguments.vocabulary)
    causal_lm = small_gemma(tokenizer, arguments)
    sizes = (arguments.length, arguments.layers, arguments.width)
    key = repr((tokenizer.get_vocabulary(), sizes, arguments.pretrain_steps)).encode()
    path = arguments.cache / f"gemma_{hashlib.sha256(key).hexdigest()[:12]}.weights.h5"
    if path.exists():
        print(f"Pre-trained weights: {path} (delete the file to train anew)")
        causal_lm.backbone.load_weights(path)
        return causal_lm
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    print(f"Pre-training on {rows.report}")
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.AdamW(2e-3, global_clipnorm=1.0))
    needed = arguments.pretrain_steps * 16
    arrays = {name: values[:needed] for name, values in rows.arrays.items()}
    model.fit(arrays, batch_size=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    causal_lm.backbone.save_weights(path)
    return causal_lm


def spread(rows, count):
    """Some rows from all over the data, as a dict of arrays."""
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return {name: values[chosen] for name, values in rows.arrays.items()}


def report(before, after):
    """A table of held-out measurements."""
    rows = {
        "feature_matching_loss": "feature-matching loss",
        "whitened_feature_matching_loss": "whitened feature-matching loss",
        "ce_loss": "cross-entropy (nats/token)",
    }
    print(f"\n{'held-out':32}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in rows.items():
        if name not in before:
            # There is no whitened loss without whitening.
            continue
        change = after[name] - before[name]
        print(f"{label:32}{before[name]:10.4f}{after[name]:10.4f}{change:+10.4f}")


def main():
    """Fine-tunes adapters and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    start = time.monotonic()
    texts, held_out = load_texts(arguments)
    if arguments.preset:
        causal_lm = keras_hub.models.CausalLM.from_preset(arguments.preset)
    else:
        causal_lm = pretrained_gemma(texts, arguments)
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    validation = spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )

    # Adapters first: the frozen network is then the same weights without them.
    causal_lm.backbone.enable_lora(arguments.rank)
    whitening = None if arguments.whitening == "none" else arguments.whitening
    model = keras_ebft.EBFTModel(
        causal_lm,
        reward=keras_ebft.FeatureMatchingReward(whitening=whitening),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )
    trained = sum(
        int(np.prod(variable.shape)) for variable in causal_lm.trainable_variables
    )
    print(f"{trained} of {causal_lm.count_params()} parameters are trained")
    model.compile(
        keras.optimizers.AdamW(
            arguments.learning_rate, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
        )
    )
    options = {"batch_size": arguments.batch_size, "return_dict": True, "verbose": 0}
    before = model.evaluate(validation, **options)
    history = model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        epochs=arguments.epochs,
        steps_per_epoch=arguments.steps,
        validation_data=validation,
        validation_batch_size=arguments.batch_size,
    )
    report(before, model.evaluate(validation, **options))

    arguments.output.mkdir(parents=True, exist_ok=True)
    adapters = arguments.output / "adapters.lora.h5"
    causal_lm.backbone.save_lora_weights(str(adapters))
    figure = keras_ebft.plots.training_curves(
        {"EBFT, LoRA": history}, before={"EBFT, LoRA": before}
    )
    figure.savefig(arguments.output / "lora_gemma.png", dpi=120)
    generate = keras_ebft.evaluation.TextGenerator(causal_lm, max_length=64)
    print(f"\n{PROMPT}{generate([PROMPT])[0][0]}")
    print(f"\nPlot: {arguments.output / 'lora_gemma.png'}")
    print(f"Adapters: {adapters}, {adapters.stat().st_size / 1024:.0f} KiB")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
