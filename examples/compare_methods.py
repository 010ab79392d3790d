"""How SFT, RLVR and EBFT are run side by side: one table and one picture.

This shows the mechanics and is no evidence for or against a method: the model is
tiny and far from converged, all methods share one learning rate, and there is one
seed. Offline: small arithmetic functions with a docstring each, whose bodies are to be
written and are checked by unit tests in the sandbox. A small Llama is first trained
on some of them for a short time; then each method starts from the same weights and
gets the same rows and the same number of steps. With `--preset` the same tasks for a
real model.

    KERAS_BACKEND=jax python examples/compare_methods.py
    KERAS_BACKEND=jax python examples/compare_methods.py --preset qwen2.5_coder_0.5b \
        --learning-rate 1e-6

- SFT learns the bodies by next-token prediction.
- RLVR samples whole bodies; those that pass their tests are rewarded.
- EBFT samples a few tokens at many places of the bodies; features are rewarded.
"""

import argparse
import functools
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import numpy as np

import keras_ebft
from keras_ebft.evaluation import (
    CodeProblem,
    FeatureMatching,
    Sandbox,
    TextGenerator,
    check_completions,
    cross_entropy,
    function_body,
    mean_pass_at_k,
)

FUNCTIONS = {
    "add": ("Return x plus {n}.", "return x + {n}"),
    "subtract": ("Return x minus {n}.", "return x - {n}"),
    "multiply": ("Return {n} times x.", "return {n} * x"),
    "at_least": ("Return x, but at least {n}.", "return max(x, {n})"),
    "at_most": ("Return x, but at most {n}.", "return min(x, {n})"),
    "is_above": ("Return whether x is above {n}.", "return x > {n}"),
}
INPUTS = (-3, 0, 1, 50, 200)


def parse_arguments():
    """Settings; the defaults take some minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", help="KerasHub preset instead of a small model")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="per method")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--pretrain-steps", type=int, default=150)
    parser.add_argument("--numbers", type=int, default=100)
    parser.add_argument("--problems", type=int, default=60, help="held out")
    parser.add_argument("--body-tokens", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    return parser.parse_args()


def make_tasks(numbers):
    """`(CodeProblem, body)` of every function and number, in a fixed random order."""
    tasks = []
    for name, (docstring, expression) in FUNCTIONS.items():
        for n in range(2, numbers + 2):
            head = f'def {name}_{n}(x):\n    """{docstring.format(n=n)}"""\n'
            body = f"    {expression.format(n=n)}\n"
            namespace = {}
            exec(head + body, namespace)
            function = namespace[f"{name}_{n}"]
            tests = "".join(
                f"assert {name}_{n}({x}) == {function(x)}\n" for x in INPUTS
            )
            tasks.append((CodeProblem(head, tests=tests), body))
    random.Random(0).shuffle(tasks)
    return tasks


class Verifier:
    """Rewards bodies that pass their function's tests. Remembers what it has run.

    Args:
        problems: list of `CodeProblem`.
    """

    def __init__(self, problems):
        self.by_name = {name_of(problem.prompt): problem for problem in problems}
        self.sandbox = Sandbox(wall_seconds=5.0)
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self.known = {}

    def __call__(self, prompts, completions, targets):
        """Numbers `[B, n, K]` for `keras_ebft.VerifierReward`."""
        wanted = [
            (name_of(prompt), function_body(text))
            for row, samples in zip(prompts, completions)
            for sample in samples
            for prompt, text in zip(row, sample)
        ]
        new = sorted(set(wanted) - set(self.known))
        self.known.update(zip(new, self.pool.map(self.passes, new)))
        shape = (len(prompts), len(completions[0]), len(prompts[0]))
        return np.array([self.known[key] for key in wanted]).reshape(shape)

    def passes(self, key):
        """1.0 if a body passes, else 0.0."""
        name, body = key
        # A dead block's prompt is empty, and what it gets is not looked at.
        if name not in self.by_name:
            return 0.0
        return float(self.by_name[name].check(body, self.sandbox).passed)


def name_of(prompt):
    """The name of the function that a prompt begins."""
    found = re.search(r"def (\w+)\(x\)", prompt)
    return found.group(1) if found else ""


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


def base_model(tasks, arguments):
    """The model every method starts from."""
    if arguments.preset:
        return keras_hub.models.CausalLM.from_preset(arguments.preset)
    texts = [problem.prompt + body for problem, body in tasks]
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(texts, arguments.vocabulary)
    causal_lm = small_llama(tokenizer, arguments)
    rows = keras_ebft.data.pack(texts, tokenizer, arguments.length).load()
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-4, arguments.pretrain_steps, warmup_target=3e-3, warmup_steps=20
    )
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.AdamW(schedule, global_clipnorm=1.0))
    fit_steps(model, rows, 16, arguments.pretrain_steps, seed=0)
    return causal_lm


def fit_steps(model, rows, batch_size, steps, seed):
    """Trains for a number of steps on rows in random order, again and again."""
    random_order = np.random.default_rng(seed)
    passes = -(-steps * batch_size // len(rows))
    order = np.concatenate(
        [random_order.permutation(len(rows)) for _ in range(passes)]
    )[: steps * batch_size]
    arrays = {name: values[order] for name, values in rows.arrays.items()}
    model.fit(arrays, batch_size=batch_size, shuffle=False)


def make_methods(causal_lm, verifier, most_documents, arguments):
    """A function that makes an `EBFTModel` for each method."""
    whole_bodies = keras_ebft.BlockSampler(
        anchors="answer_start",
        num_anchors=most_documents,
        rollout_length=arguments.body_tokens,
        temperature=1.0,
    )
    few_tokens = keras_ebft.BlockSampler(rollout_length=4, stride=2, context_length=4)
    build = functools.partial(keras_ebft.EBFTModel, causal_lm, seed=arguments.seed)
    return {
        "SFT": functools.partial(
            keras_ebft.EBFTModel.sft, causal_lm, seed=arguments.seed
        ),
        "RLVR": functools.partial(
            build, whole_bodies, reward=keras_ebft.VerifierReward(verifier)
        ),
        "EBFT": functools.partial(build, few_tokens, ce_weight=0.03),
    }


def report(results):
    """The table."""
    columns = f"{'pass@1':>10}{'CE (nats)':>12}{'FM loss':>10}{'seconds':>10}"
    print(f"\n{'held-out':10}{columns}")
    for name, values in results.items():
        print(
            f"{name:10}{values['pass@1']:10.3f}{values['answer_cross_entropy']:12.4f}"
            f"{values['unbiased_feature_matching_loss@4']:10.4f}{values['seconds']:10.0f}"
        )


def main():
    """Trains with every method and compares."""
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    tasks = make_tasks(arguments.numbers)
    held_out, training = tasks[: arguments.problems], tasks[arguments.problems :]
    causal_lm = base_model(training, arguments)
    tokenizer = causal_lm.preprocessor.tokenizer

    def pack(chosen):
        pairs = [(problem.prompt, body) for problem, body in chosen]
        return keras_ebft.data.pack(pairs, tokenizer, arguments.length).load()

    rows, validation = pack(training), pack(held_out).arrays
    print(rows.report)
    problems = [problem for problem, _ in held_out]
    generate = TextGenerator(causal_lm, arguments.length, batch_size=len(problems))
    feature_matching = FeatureMatching(
        keras_ebft.EBFTModel(
            causal_lm,
            keras_ebft.BlockSampler(rollout_length=4, stride=2, context_length=4),
        ),
        rollout_lengths=(4,),
        num_samples=8,
    )

    def measure():
        written = generate([problem.prompt for problem in problems])
        bodies = [[function_body(text) for text in texts] for texts in written]
        return {
            "pass@1": mean_pass_at_k(check_completions(problems, bodies), k=1),
            **cross_entropy(causal_lm, validation),
            **feature_matching(validation, batch_size=arguments.batch_size),
        }

    verifier = Verifier([problem for problem, _ in tasks])
    most_documents = int(rows.arrays["segment_ids"].max())
    methods = make_methods(causal_lm, verifier, most_documents, arguments)
    weights = causal_lm.get_weights()
    results = {"base": {**measure(), "seconds": 0.0}}
    for name, make in methods.items():
        print(f"\n{name}")
        causal_lm.set_weights(weights)
        start = time.monotonic()
        model = make()
        model.compile(
            keras.optimizers.AdamW(
                arguments.learning_rate,
                beta_2=0.95,
                weight_decay=0.0,
                global_clipnorm=1.0,
            )
        )
        fit_steps(model, rows, arguments.batch_size, arguments.steps, arguments.seed)
        results[name] = {**measure(), "seconds": time.monotonic() - start}
    report(results)

    figure = keras_ebft.plots.accuracy_plane(
        {
            name: (values["answer_cross_entropy"], values["pass@1"])
            for name, values in results.items()
        },
        accuracy_label="held-out pass@1",
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "compare_methods.png", dpi=120)
    print(f"\nPlot: {arguments.output / 'compare_methods.png'}")


if __name__ == "__main__":
    main()
