"""Seconds and memory of one training step, and of each of its phases.

    KERAS_BACKEND=jax python benchmarks/step.py --phases
    python benchmarks/step.py --backends jax tensorflow torch --results step

Each phase runs in a process of its own, so that its memory is its own too. `peak` is
the highest resident memory of the process while steps are repeated after the first
call, with the framework, the weights and everything else in it;
`peak with compilation` includes the first call.
"""

import argparse
import json
import os

import harness

DEFAULTS = {
    "length": 1024,
    "batch": 1,
    "samples": 4,
    "rollout": 8,
    "stride": 8,
    "context": 8,
    "vocabulary": 8192,
    "layers": 8,
    "width": 256,
    "dtype": "float32",
    "rematerialize": 0,
    "micro_batches": 1,
    "repeats": 3,
}
PHASES = ("prefill", "rollout", "features", "rewards", "policy", "optimizer", "step")


def add_shape_arguments(parser):
    """The shape of model and batch, as command-line options."""
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)


def shape_of(arguments):
    """The shape that was asked for, as a dict."""
    return {name: getattr(arguments, name) for name in DEFAULTS}


def model_config(shape):
    """Entries of `harness.LLAMA` that a shape decides."""
    width = shape["width"]
    return {
        "vocabulary_size": shape["vocabulary"],
        "num_layers": shape["layers"],
        "hidden_dim": width,
        # The proportions of the reference model: heads of 32, MLP of 2.75 widths.
        "num_query_heads": width // 32,
        "num_key_value_heads": width // 64,
        "intermediate_dim": width * 11 // 4,
    }


def measure_phase(phase, shape):
    """Measures one phase in this process; see `harness.measure`."""
    from phases import make_phase

    model = harness.make_model(shape, **model_config(shape))
    tokens = harness.random_tokens(shape, shape["vocabulary"])
    run = make_phase(phase, model, tokens)
    found = harness.measure(run, shape["repeats"])
    variables = [*model.variables, *model.optimizer.variables]
    return {**found, "variables": sum(map(harness.num_bytes, variables))}


def measure_alone(backend, phase, shape):
    """`measure_phase` in a process of its own, with a backend of its own."""
    options = [str(part) for name, v in shape.items() for part in (f"--{name}", v)]
    return harness.run_alone(
        [__file__, "--only", phase, *options],
        {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def row(backend, phase, found):
    """One line of the table."""
    memory = (
        f"{found[name] / harness.MIB:.0f}"
        for name in ("resident", "peak", "peak_with_compilation")
    )
    first = found["first_call"] - found["seconds"]
    return (backend, phase, f"{found['seconds']:.2f}", f"{first:.1f}", *memory)


COLUMNS = (
    "backend", "phase", "seconds", "first call beyond that, s",
    "resident before, MiB", "peak, MiB", "peak with compilation, MiB",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_arguments(parser)
    parser.add_argument("--backends", nargs="+")
    parser.add_argument("--phases", action="store_true", help="each phase too")
    parser.add_argument("--only", choices=PHASES, help="one phase, in this process")
    parser.add_argument("--results", help="write results/<name>.json and .md")
    arguments = parser.parse_args()
    shape = shape_of(arguments)
    if arguments.only:
        print(json.dumps(measure_phase(arguments.only, shape)))
        return
    backends = arguments.backends or [os.environ.get("KERAS_BACKEND", "jax")]
    phases = PHASES if arguments.phases else PHASES[-1:]
    found = {}
    for backend in backends:
        for phase in phases:
            measured = measure_alone(backend, phase, shape)
            found[f"{backend} {phase}"] = measured
            print(*row(backend, phase, measured), sep=" | ", flush=True)
    rows = [row(*name.split(), measured) for name, measured in found.items()]
    text = harness.table(COLUMNS, rows)
    if arguments.results:
        given = {k: v for k, v in shape.items() if v != DEFAULTS[k]}
        options = [f"--{name} {value}" for name, value in given.items()]
        command = " ".join(
            ["python benchmarks/step.py", "--backends", *backends, *options]
            + ["--phases"] * arguments.phases
        )
        harness.write_results(
            arguments.results, command, text, {"shape": shape, "found": found}
        )
    else:
        print(text)


if __name__ == "__main__":
    main()
