"""Prints what this machine runs on each hot path, why, how right and how fast.

    KERAS_BACKEND=jax python -m keras_ebft.kernels
    python -m keras_ebft.kernels --kept     # what was found before, and nothing else
    python -m keras_ebft.kernels --clear    # forgets it

Everything runs in a process of its own: this one never takes the device. What could
not be tried while a training had the device is tried, too.
"""

import argparse
import importlib

from keras_ebft import kernels
from keras_ebft.backend.runtime import backend_name
from keras_ebft.kernels import dispatch, qualification

PATHS = (
    "causal_attention",
    "strided_attention",
    "linear_logprob",
    "linear_sample",
    "feature_reward",
    "projection",
)


def main(arguments=None):
    """Prints; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_ebft.kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kept", action="store_true", help="print what is kept")
    parser.add_argument("--clear", action="store_true", help="forget what is kept")
    options = parser.parse_args(arguments)
    if options.clear:
        print(f"{qualification.kept.clear()} verdicts forgotten.")
    elif options.kept:
        _print_kept()
    else:
        _print_machine()


def _print_kept():
    for trial, verdict in qualification.kept.entries():
        print(f"- {verdict.sentence(trial)}")
    print(f"Kept in {qualification.kept.folder()}.")


def _print_machine():
    process = qualification.process_of(backend_name())
    device, place = process.device, process.place
    print(f"{backend_name()} on {device} {qualification.versions(backend_name())}")
    for op in PATHS:
        print(f"\n{op}")
        for line in _path_lines(op, device, place):
            print(f"  {line}")
    for trial, verdict in qualification.kept.entries():
        if trial.device == device and not verdict.is_final and _is_known(trial):
            print(f"\n{qualification.verdict_of(trial).sentence(trial)}")


def _is_known(trial):
    """Whether what was to be tried is still there, and of this backend."""
    return trial.backend == backend_name() and any(
        (record.name, record.target) == (trial.name, trial.target)
        for record in kernels.implementations(trial.op)
    )


def _path_lines(op, device, place):
    """What is said of one path: every implementation up to the one that runs."""
    specs = importlib.import_module(f"keras_ebft.kernels.{op}.specs")
    is_slow = place.platform == "cpu"
    spec, dtype = (specs.SMALL, "float32") if is_slow else (specs.BENCHMARK, "bfloat16")
    call = dispatch.Call(
        op,
        backend_name(),
        place,
        frozenset([dtype]),
        getattr(spec, "head_size", None),
        spec.in_use(),
    )
    shapes = tuple(spec.shapes().values())
    settings = {k: v for k, v in spec.options().items() if k != "query_offset"}
    for record in kernels.implementations(op):
        refusal = record.refusal(call, qualified=True)
        if refusal is not None:
            yield f"{record.name}: needs {refusal}"
            continue
        trial = dispatch.trial_of(call, record, device, shapes, settings)
        if record.unproven:
            verdict = qualification.verdict_of(trial)
            yield f"{record.name}: {verdict.sentence(trial)}"
            if verdict.outcome != "faster":
                continue
        yield f"{record.name}: runs ({dtype}, {shapes[0]})"
        yield from _against_definition(record, trial)
        return


def _against_definition(record, trial):
    if record.target == trial.definition_target:
        yield "  it is the definition"
        return
    against = trial.against_definition()
    verdict = qualification.verdict_of(against)
    yield f"  against the definition: {verdict.numbers() or verdict.detail}"


if __name__ == "__main__":
    main()
