"""A training step of SmolLM2-135M: time, memory, and the authors' code beside it.

    python benchmarks/real_model.py --results real_model
    python benchmarks/real_model.py --reference <checkout of the authors' code>

Each row runs in a process of its own: `adapters` trains low-rank adapters of rank 8,
`full` every weight. The authors' code, on the same weights, trains every weight in
float32 on PyTorch (see `compare.py` on what it needs). Memory is the highest resident
memory while steps are repeated after the first, everything in it.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np

SHAPE = {
    "length": 128,
    "batch": 2,
    "samples": 4,
    "rollout": 8,
    "stride": 8,
    "context": 8,
    "rematerialize": 0,
    "micro_batches": 1,
    "repeats": 3,
}
TRAINED = ("adapters", "full")
POLICIES = ("float32", "mixed_bfloat16")
PHASES = ("prefill", "rollout", "features", "rewards", "policy", "optimizer")
COLUMNS = (
    "", "trained", "policy", "step, s", "first call beyond that, s", "peak, MiB",
    "peak with compilation, MiB", *(f"{phase}, s" for phase in PHASES),
)  # fmt: skip


def load(dtype):
    """SmolLM2 as the library loads it."""
    from keras_ebft.models import smollm2

    return smollm2(dtype=dtype)


def measure(shape, trained, policy, phases):
    """One row, in this process; see `harness.measure`."""
    from phases import make_phase

    causal_lm = load(policy)
    if trained == "adapters":
        causal_lm.backbone.enable_lora(8)
    model = harness.compiled_model(causal_lm, shape)
    tokens = harness.random_tokens(shape, causal_lm.backbone.vocabulary_size)
    found = harness.measure(make_phase("step", model, tokens), shape["repeats"])
    found["phases"] = {
        phase: harness.measure(make_phase(phase, model, tokens), shape["repeats"])[
            "seconds"
        ]
        for phase in (PHASES if phases else ())
    }
    return found


def measure_reference(checkout, shape, attention):
    """The authors' step on the same weights, in this process."""
    from compare import run_reference

    import keras_ebft

    causal_lm = load("float32")
    sized = {**shape, "vocabulary": causal_lm.backbone.vocabulary_size}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smollm2"
        keras_ebft.export_to_hugging_face(causal_lm, path)
        del causal_lm
        found = run_reference(checkout, path, sized, attention)
    return {
        "seconds": found["seconds"]["step"],
        "peak": found["peak"],
        "phases": {k: v for k, v in found["seconds"].items() if k != "step"},
    }


def row(label, trained, policy, found):
    """One line of the table."""
    missing = float("nan")
    first = found.get("first_call", missing) - found["seconds"]
    memory = [found["peak"], found.get("peak_with_compilation", missing)]
    numbers = [
        f"{found['seconds']:.2f}",
        f"{first:.1f}",
        *(f"{value / harness.MIB:.0f}" for value in memory),
        *(f"{found['phases'].get(phase, missing):.2f}" for phase in PHASES),
    ]
    return (label, trained, policy, *("-" if n == "nan" else n for n in numbers))


def alone(arguments, shape, backend, *options):
    """One row in a process of its own."""
    given = [str(part) for name, v in shape.items() for part in (f"--{name}", v)]
    phases = ["--phases"] if arguments.phases else []
    return harness.run_alone(
        [__file__, *options, *given, *phases],
        {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--phases", action="store_true", help="each phase too")
    parser.add_argument(
        "--reference", type=Path, help="a checkout of the authors' code"
    )
    parser.add_argument("--results", help="write results/<name>.json and .md")
    parser.add_argument("--only", nargs=2, help="one row, in this process")
    parser.add_argument("--attention", help="the authors' row, in this process")
    return parser.parse_args()


def measure_all(arguments, shape):
    """`(backend or code, trained, policy, found)` of every row."""
    combinations = itertools.product(
        arguments.backends, arguments.trained, arguments.policies
    )
    for backend, trained, policy in combinations:
        found = alone(arguments, shape, backend, "--only", trained, policy)
        yield backend, trained, policy, found
    for attention in ("eager", "sdpa") if arguments.reference else ():
        options = ("--attention", attention, "--reference", arguments.reference)
        found = alone(arguments, shape, "torch", *options)
        yield f"authors' code, {attention}", "full", "float32", found


def main():
    arguments = parse_arguments()
    shape = {name: getattr(arguments, name) for name in SHAPE}
    if arguments.only:
        print(json.dumps(measure(shape, *arguments.only, arguments.phases)))
        return
    if arguments.attention:
        checkout = arguments.reference.resolve()
        print(json.dumps(measure_reference(checkout, shape, arguments.attention)))
        return
    rows, record = [], []
    for *names, found in measure_all(arguments, shape):
        rows.append(row(*names, found))
        record.append([*names, found])
        print(*rows[-1], sep=" | ", flush=True)
    text = harness.table(COLUMNS, rows)
    blocks = len(np.arange(shape["context"], shape["length"] - shape["rollout"] + 1,
                           shape["stride"]))  # fmt: skip
    text = f"SmolLM2-135M, B = {shape['batch']}, K = {blocks} blocks: {shape}\n\n{text}"
    if arguments.results:
        # The path of the checkout is nobody's business.
        given = [
            "<checkout>" if word == str(arguments.reference) else word
            for word in sys.argv[1:]
        ]
        command = " ".join(["python benchmarks/real_model.py", *given])
        record = {"shape": shape, "found": record}
        harness.write_results(arguments.results, command, text, record)
    else:
        print(text)


if __name__ == "__main__":
    main()
