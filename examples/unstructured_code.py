"""EBFT on plain source code, the paper's second task: no prompts, no answers.

Offline by default: the Python standard library of the running interpreter, and a
small Llama that is first trained on it with next-token prediction (cached).

    KERAS_BACKEND=jax python examples/unstructured_code.py
    KERAS_BACKEND=jax python examples/unstructured_code.py \
        --preset qwen2.5_coder_1.5b --dataset swallowcode \
        --split "train[:1%]" --held-out-split "train[-1%:]" --length 1024 \
        --batch-size 16 --learning-rate 1e-6 --temperature 0.6 --ce-weight 0.03 \
        --whitening rollout

The second command has the paper's settings; a small model that has seen little text
wants a higher learning rate and more cross-entropy.

Ends with a table of held-out measurements and a plot of the feature-matching loss
against rollout length, before and after.
"""

import argparse
import hashlib
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import numpy as np

import keras_ebft

WITHOUT_TESTS = f"{platform.python_version()}-without_tests"


def parse_arguments():
    """Settings; the defaults take some minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", help="KerasHub preset instead of a small model")
    parser.add_argument("--dataset", default="python_source")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--held-out-split", help="default: validation")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument(
        "--whitening", choices=("rollout", "feature", "none"), default="none"
    )
    parser.add_argument("--ce-weight", type=float, default=0.15)
    parser.add_argument("--held-out-samples", type=int, default=8, help="per block")
    parser.add_argument("--held-out-rows", type=int, default=384)
    parser.add_argument("--rollout-lengths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--cache", type=Path, default=cache / "keras_ebft")
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


def small_llama(tokenizer, arguments):
    """A Llama that fits a laptop."""
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=arguments.layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=arguments.width,
        intermediate_dim=arguments.width * 8 // 3,
        rope_max_wavelength=10000,
        tie_word_embeddings=True,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=arguments.length
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)


def pretrained_llama(texts, arguments):
    """The small model after next-token prediction; its weights are cached."""
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(texts, arguments.vocabulary)
    causal_lm = small_llama(tokenizer, arguments)
    vocabulary = sorted(tokenizer.get_vocabulary())
    sizes = (arguments.length, arguments.layers, arguments.width)
    key = repr((vocabulary, sizes, arguments.pretrain_steps)).encode()
    path = arguments.cache / f"code_{hashlib.sha256(key).hexdigest()[:12]}.weights.h5"
    if path.exists():
        print(f"Pre-trained weights: {path} (delete the file to train anew)")
        causal_lm.backbone.load_weights(path)
        return causal_lm
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    print(f"Pre-training on {rows.report}")
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-4, arguments.pretrain_steps, warmup_target=3e-3, warmup_steps=20, alpha=0.05
    )
    model.compile(keras.optimizers.AdamW(schedule, global_clipnorm=1.0))
    # Small batches: for so few tokens, more steps teach more than less noise does.
    needed = np.arange(arguments.pretrain_steps * 4) % len(rows)
    arrays = {name: values[needed] for name, values in rows.arrays.items()}
    model.fit(arrays, batch_size=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    causal_lm.backbone.save_weights(path)
    return causal_lm


def spread(rows, count):
    """Some rows from all over the data, as a dict of arrays."""
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return {name: values[chosen] for name, values in rows.arrays.items()}


def make_reward(whitening):
    """With or without whitening. Without it, what is measured is what is trained."""
    return keras_ebft.FeatureMatchingReward(
        whitening=None if whitening == "none" else whitening
    )


def report(before, after, lengths):
    """A table of held-out measurements."""
    rows = {}
    for g in lengths:
        rows[f"unbiased_feature_matching_loss@{g}"] = (
            f"feature-matching loss, {g} tokens"
        )
        rows[f"whitened_feature_matching_loss@{g}"] = "  whitened, as in training"
    rows |= {"ce_loss": "cross-entropy (nats/token)", "perplexity": "perplexity"}
    print(f"\n{'held-out':38}{'before':>10}{'after':>10}{'change':>10}")
    for name, label in rows.items():
        if name not in before:
            continue
        change = after[name] - before[name]
        print(f"{label:38}{before[name]:10.4f}{after[name]:10.4f}{change:+10.4f}")


def by_length(values, lengths):
    """Feature-matching loss for every rollout length."""
    return {g: values[f"unbiased_feature_matching_loss@{g}"] for g in lengths}


def main():
    """Fine-tunes and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    start = time.monotonic()
    texts = load_texts(arguments, arguments.split)
    held_out = load_texts(arguments, arguments.held_out_split or "validation")
    if arguments.preset:
        causal_lm = keras_hub.models.CausalLM.from_preset(arguments.preset)
    else:
        causal_lm = pretrained_llama(texts, arguments)
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    print(rows.report)
    validation = spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )

    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(temperature=arguments.temperature),
        reward=make_reward(arguments.whitening),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )
    # Falling to zero, so that the last steps' noise does not stay in the weights.
    schedule = keras.optimizers.schedules.CosineDecay(
        arguments.learning_rate, arguments.steps
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
        )
    )
    feature_matching = keras_ebft.evaluation.FeatureMatching(
        model,
        rollout_lengths=arguments.rollout_lengths,
        num_samples=arguments.held_out_samples,
        seed=arguments.seed,
    )
    before = feature_matching(validation, batch_size=arguments.batch_size)
    model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        steps_per_epoch=arguments.steps,
    )
    after = feature_matching(validation, batch_size=arguments.batch_size)
    report(before, after, arguments.rollout_lengths)

    figure = keras_ebft.plots.rollout_length_curves(
        {
            "before": by_length(before, arguments.rollout_lengths),
            "after": by_length(after, arguments.rollout_lengths),
        },
        label="held-out feature-matching loss",
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "unstructured_code.png", dpi=120)
    print(f"\nPlot: {arguments.output / 'unstructured_code.png'}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
