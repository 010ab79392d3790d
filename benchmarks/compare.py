"""One training step against the paper authors' code, on the same weights and shapes.

    git clone https://github.com/sjelassi/ebft_openrlhf reference
    pip install peft transformers
    python benchmarks/compare.py --reference reference --results compare

Their code is imported from the checkout (see `reference.py`) and runs on PyTorch, as
ours does on each backend, one process after the other. First both score the same
rollouts: their log-probabilities have to agree. Memory is the highest resident memory
of the process while steps are repeated after the first, everything in it.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import harness
import step as own

HERE = Path(__file__).resolve().parent
PHASES = ("rollout", "features", "rewards", "policy", "optimizer")


@contextlib.contextmanager
def without_scripts():
    """Context without this folder among imports.

    `kernels.py` has the name of a package that `transformers` looks for.
    """
    kept = list(sys.path)
    sys.path[:] = [p for p in kept if Path(p).resolve() != HERE]
    try:
        yield
    finally:
        sys.path[:] = kept


def write_checkpoint(folder, config, length, *, tied=False, dtype="float32"):
    """A random Llama of a config in Hugging Face layout, for documents of a length."""
    import torch

    with without_scripts():
        from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaConfig(
        vocab_size=config["vocabulary_size"],
        hidden_size=config["hidden_dim"],
        intermediate_size=config["intermediate_dim"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_query_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        max_position_embeddings=2 * length,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(made).to(getattr(torch, dtype)).save_pretrained(folder)


def random_rollouts(shape):
    """int32 `[B, n, K, G]`, the same on both sides."""
    import numpy as np

    length = shape["length"] - shape["rollout"] - shape["context"]
    blocks = length // shape["stride"] + 1
    size = (shape["batch"], shape["samples"], blocks, shape["rollout"])
    generator = np.random.default_rng(3)
    return generator.integers(0, shape["vocabulary"], size).astype("int32")


def run_reference(checkout, folder, shape, attention):
    """Seconds per phase and in all, memory, log-probabilities of given rollouts."""
    import torch
    from reference import ReferenceStep

    tokens = harness.random_tokens(shape, shape["vocabulary"])
    with without_scripts():
        step = ReferenceStep(checkout, folder, shape, tokens, attention)
    rollouts = random_rollouts(shape)
    with torch.no_grad():
        given = step.log_prob(step.sequences(rollouts))[:, tokens.shape[1] - 1 :]
    axes = (*rollouts.shape[:2], rollouts.shape[3], rollouts.shape[2])
    log_prob = given.reshape(axes).transpose(2, 3)

    def once():
        clock = [time.perf_counter()]

        def done(value):
            clock.append(time.perf_counter())
            return value

        sequences = done(step.rollout())
        features = done(step.features(sequences))
        advantages = done(step.rewards(*features))
        done(step.policy(sequences, advantages))
        done(step.update())
        spent = (end - start for start, end in itertools.pairwise(clock))
        return dict(zip(PHASES, spent)) | {"step": clock[-1] - clock[0]}

    once()
    with harness.PeakMemory() as memory:
        runs = [once() for _ in range(shape["repeats"])]
    found = {
        name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]
    }
    return {"seconds": found, "peak": memory.peak, "log_prob": log_prob.tolist()}


def run_own(folder, shape):
    """The same of this library; phases one by one, memory of the whole step."""
    import keras_hub
    import numpy as np
    from phases import make_phase

    from keras_ebft.backend.runtime import no_gradient

    backbone = keras_hub.models.LlamaBackbone.from_preset(
        str(folder), dtype=shape["dtype"]
    )
    model = harness.compiled_model(keras_hub.models.LlamaCausalLM(backbone), shape)
    tokens = harness.random_tokens(shape, shape["vocabulary"])
    # A graph for its gradient is nothing that a training step would keep.
    with no_gradient():
        scores = model.score(tokens, random_rollouts(shape))["log_prob"]
    log_prob = np.asarray(_to_numpy(scores)).tolist()
    whole = harness.measure(make_phase("step", model, tokens), shape["repeats"])
    seconds = {
        phase: harness.measure(make_phase(phase, model, tokens), shape["repeats"])[
            "seconds"
        ]
        for phase in ("prefill", *PHASES)
    }
    return {
        "seconds": {**seconds, "step": whole["seconds"]},
        "peak": whole["peak"],
        "first_call": whole["first_call"],
        "log_prob": log_prob,
    }


def _to_numpy(tensor):
    from keras import ops

    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def compare(reference, found):
    """Rows of seconds and ratios, and the largest difference of log-probabilities."""
    import numpy as np

    theirs, ours = reference["seconds"], found["seconds"]
    rows = []
    for phase in ("prefill", *PHASES, "step"):
        one, two = theirs.get(phase), ours[phase]
        ratio = f"{one / two:.1f}" if one and two > 0.005 else ""
        rows.append((phase, f"{one:.2f}" if one else "-", f"{two:.2f}", ratio))
    memory = [side["peak"] / harness.MIB for side in (reference, found)]
    rows.append(
        (
            "peak memory, MiB",
            *(f"{m:.0f}" for m in memory),
            f"{memory[0] / memory[1]:.1f}",
        )
    )
    difference = np.abs(np.subtract(reference["log_prob"], found["log_prob"])).max()
    return rows, float(difference)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    own.add_shape_arguments(parser)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout")
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--results", help="write results/<name>.json and .md")
    parser.add_argument("--side", help="one side, in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--attention",
        choices=("eager", "sdpa"),
        default="eager",
        help="theirs: as their trainer loads models, or PyTorch's fused attention",
    )
    arguments = parser.parse_args()
    shape = own.shape_of(arguments)
    if arguments.side:
        if arguments.side == "reference":
            found = run_reference(
                arguments.reference.resolve(),
                arguments.folder,
                shape,
                arguments.attention,
            )
        else:
            found = run_own(arguments.folder, shape)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, own.model_config(shape), shape["length"])
        options = [str(part) for name, v in shape.items() for part in (f"--{name}", v)]

        def run(side, backend):
            return harness.run_alone(
                [__file__, "--side", side, "--folder", folder, "--reference",
                 arguments.reference, "--attention", arguments.attention, *options],
                {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )  # fmt: skip

        found = {"reference": run("reference", "torch")}
        texts = []
        for backend in arguments.backends:
            found[backend] = run("own", backend)
            rows, difference = compare(found["reference"], found[backend])
            columns = ("phase", "authors' code, s", f"here on {backend}, s", "ratio")
            text = harness.table(columns, rows)
            text += (
                f"\n\nLog-probabilities of the same rollouts: within {difference:.1e}."
            )
            print(text, flush=True)
            texts.append(text)
    for side in found.values():
        del side["log_prob"]
    if arguments.results:
        given = [f"--{k} {v}" for k, v in shape.items() if v != own.DEFAULTS[k]]
        command = " ".join(
            [
                "python benchmarks/compare.py --reference <checkout>",
                f"--attention {arguments.attention}",
                f"--backends {' '.join(arguments.backends)}",
                *given,
            ]
        )
        record = {"shape": shape, "found": found}
        harness.write_results(arguments.results, command, "\n\n".join(texts), record)


if __name__ == "__main__":
    main()
