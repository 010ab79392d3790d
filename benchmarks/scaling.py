"""How seconds, memory and compile time of a step grow with its shape.

    python benchmarks/scaling.py --sweeps length vocabulary rollout --results scaling
    python benchmarks/scaling.py --sweeps length --phase prefill --backend torch
    python benchmarks/scaling.py --sweeps rollout --stride 64

Everything but the swept value stays as in `step.py`. `growth` is the slope of a
straight line through the logarithms: time grows as value^growth.
"""

import argparse
import math

import harness
import step

SWEEPS = {
    "length": (256, 512, 1024, 2048),
    "samples": (2, 4, 8),
    "rollout": (4, 8, 16, 64),
    "stride": (4, 8, 16),
    "vocabulary": (8192, 32768, 131072),
    "batch": (1, 2, 4),
    "width": (128, 256, 512),
}


def growth(values, amounts):
    """Least-squares slope of log(amount) by log(value)."""
    x = [math.log(value) for value in values]
    y = [math.log(amount) for amount in amounts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def sweep(name, backend, phase, shape):
    """Measures one phase at each value; returns dict value -> measured."""
    found = {}
    for value in SWEEPS[name]:
        found[value] = step.measure_alone(backend, phase, {**shape, name: value})
        print(name, value, *step.row(backend, phase, found[value]), flush=True)
    return found


def describe(name, found):
    """A table of one sweep and the growth of time with the value."""
    rows = []
    for value, measured in found.items():
        weights = measured["variables"] / harness.MIB
        rows.append(
            (
                value,
                f"{measured['seconds']:.2f}",
                f"{measured['first_call'] - measured['seconds']:.1f}",
                f"{measured['peak'] / harness.MIB:.0f}",
                f"{weights:.0f}",
            )
        )
    columns = (
        name,
        "seconds",
        "first call beyond that, s",
        "peak, MiB",
        "variables, MiB",
    )
    slope = growth(list(found), [measured["seconds"] for measured in found.values()])
    return f"{harness.table(columns, rows)}\n\nSeconds grow as {name}^{slope:.2f}."


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    step.add_shape_arguments(parser)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--phase", choices=step.PHASES, default="step")
    parser.add_argument("--results", help="write results/<name>.json and .md")
    arguments = parser.parse_args()
    shape = step.shape_of(arguments)
    found = {
        name: sweep(name, arguments.backend, arguments.phase, shape)
        for name in arguments.sweeps
    }
    text = "\n\n".join(describe(name, measured) for name, measured in found.items())
    if not arguments.results:
        print(text)
        return
    command = (
        f"python benchmarks/scaling.py --backend {arguments.backend} "
        f"--phase {arguments.phase} --sweeps {' '.join(arguments.sweeps)}"
    )
    for name, value in shape.items():
        command += f" --{name} {value}" if value != step.DEFAULTS[name] else ""
    harness.write_results(arguments.results, command, text, found)


if __name__ == "__main__":
    main()
