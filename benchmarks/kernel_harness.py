"""What the benchmarks of kernels share, whatever runs the kernels.

Every number is measured in the call that writes it. What fails or is out of time says
so in the JSON, and the exit code is then 1.
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from importlib import metadata

import keras

from keras_ebft import kernels
from keras_ebft.backend.device import device_of
from keras_ebft.kernels import dispatch


def milliseconds(function, wait, rounds=5, target=0.1):
    """Median over rounds of the mean time of a call, warmed up.

    `wait` takes what the function returned last, and returns when all is done.
    """
    wait(function())
    start = time.perf_counter()
    wait(function())
    calls = max(1, min(50, int(target / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            found = function()
        wait(found)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def able(op, tensor, dtype="bfloat16", head_size=None, options=frozenset()):
    """The implementations that can run here, forced if need be."""
    call = dispatch.Call(
        op,
        keras.backend.backend(),
        device_of(tensor),
        frozenset([dtype]),
        head_size,
        options,
    )
    found = kernels.implementations(op)
    return [i for i in found if i.refusal(call, forced=True) is None]


def load(op, name):
    """An implementation by name."""
    return next(i for i in kernels.implementations(op) if i.name == name).load()


def attempt(function, *arguments):
    """What a function returns, or its traceback: one failure must not cost the rest."""
    try:
        return function(*arguments)
    except NotImplementedError as error:
        return {"not supported": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()}


def has_failed(result):
    """Whether anything in a nested result failed."""
    if not isinstance(result, dict):
        return False
    return "failed" in result or any(has_failed(value) for value in result.values())


def with_ratios(times, key):
    """Adds to every entry its time over that of each entry it is compared with."""
    for own in times.values():
        if key in own:
            own["time_over"] = {
                name: own[key] / other[key]
                for name, other in times.items()
                if other is not own and key in other
            }


def strided_flops(spec):
    """Of the two products of `strided_attention`, forward, masked places left out."""
    seen = spec.samples * spec.queries * int(spec.places()[0].sum())
    seen += spec.samples * spec.blocks * spec.queries * (spec.queries + 1) // 2
    return 4 * spec.batch * spec.heads * spec.head_size * seen


def with_flops(times, flops, backward=2.5):
    """Adds what each entry achieves; backward in forward passes' work."""
    for entry in times.values():
        if "forward_ms" in entry:
            entry["forward_tflops"] = flops / entry["forward_ms"] / 1e9
            entry["both_tflops"] = (1 + backward) * flops / entry["both_ms"] / 1e9


def versions(*packages):
    """Of Python and of what is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        if importlib.util.find_spec(package.replace("-", "_")):
            found[package] = metadata.version(package)
    return found


def run(description, sections, describe, *, finish=None, clean=gc.collect):
    """Runs sections of a benchmark from the command line.

    Args:
        description: str, for `--help`.
        sections: functions of `tiny` that return a dict for the JSON.
        describe: function that returns what numbers depend on, `device` among it.
        finish: function of the section's name, its result and all results before.
        clean: called after each section.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("output")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=450.0)
    arguments = parser.parse_args()
    results = {**describe(), "tiny": arguments.tiny}
    if results["device"] == "cpu" and not arguments.tiny:
        parser.error("Expected an accelerator. Use --tiny to run without one.")
    start = time.monotonic()
    failed = False
    for section in sections:
        begun, name = time.monotonic(), section.__name__
        if begun - start > arguments.seconds:
            result = {"failed": "out of time"}
        else:
            result = attempt(section, arguments.tiny)
        if finish is not None:
            finish(name, result, results)
        failed |= has_failed(result)
        results[name] = {**result, "section_seconds": time.monotonic() - begun}
        print(name, json.dumps(results[name], indent=1), flush=True)
        with open(arguments.output, "w") as file:
            json.dump(results, file, indent=1)
        clean()
    sys.exit(failed)
