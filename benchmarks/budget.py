"""Where a training step's time goes: each phase beside its own matrix products.

    python benchmarks/budget.py --backends jax tensorflow torch --results budget

A phase's operations are counted (`keras_ebft.estimates.work`), and the rate of matrix
products of the step's shapes, done as the library does them on the backend, is measured
in the same run, in a process of its own. `products` is what the phase would take at
that rate, `times` how much longer it takes. Shapes are options of `step.py`; here rows
are 264 tokens long.
"""

import argparse
import functools
import json

import harness
import step

SHAPE = {**step.DEFAULTS, "length": 264, "batch": 2, "repeats": 5}
PHASES = step.PHASES


def operations(shape):
    """Operations of each phase as `phases.py` cuts them, a dict of floats."""
    config = {**harness.LLAMA, **step.model_config(shape)}
    work = harness.work_of(shape, config, bool(shape["rematerialize"]))
    return {
        "prefill": work.documents,
        "rollout": work.rollouts,
        "features": work.features,
        "rewards": 0.0,
        # The policy's phase reads the documents itself, for their gradient.
        "policy": work.documents + work.policy,
        "optimizer": 0.0,
        "step": work.total,
    }


def product_shapes(shape):
    """`(rows, in, out)` of the products of one layer and of the head."""
    width, middle = shape["width"], shape["width"] * 11 // 4
    blocks = (shape["length"] - shape["context"]) // shape["stride"]
    rows = shape["batch"] * blocks * shape["samples"] * shape["rollout"]
    layer = ((width, width), (width, middle), (middle, width))
    return [(rows, *size) for size in (*layer, (width, shape["vocabulary"]))]


def measure_rate(shape):
    """Operations per second of matrix products of the step's shapes."""
    import keras
    import numpy as np
    from phases import compiled, wait

    from keras_ebft.kernels.projection import projection

    done, seconds = 0.0, 0.0
    generator = np.random.default_rng(0)
    model = keras.Sequential()
    model.jit_compile = keras.backend.backend() == "jax"
    for rows, inner, outer in product_shapes(shape):
        left, right = (
            keras.ops.convert_to_tensor(generator.normal(size=size).astype("float32"))
            for size in ((rows, inner), (inner, outer))
        )
        run = functools.partial(compiled(projection, model), left, right)
        found = harness.measure(lambda run=run: wait(run()), 4 * shape["repeats"])
        seconds += found["seconds"]
        done += 2 * rows * inner * outer
    return {"rate": done / seconds}


def measure_all(backend, shape):
    """The rate and every phase, each in a process of its own."""
    options = [str(part) for name, v in shape.items() for part in (f"--{name}", v)]
    rate = harness.run_alone(
        [__file__, "--rate", *options],
        {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    phases = {phase: step.measure_alone(backend, phase, shape) for phase in PHASES}
    return {"rate": rate, **phases}


def rows_of(backend, found, counted):
    """Lines of the table of one backend."""
    rate = found["rate"]["rate"]
    for phase in PHASES:
        seconds, products = found[phase]["seconds"], counted[phase] / rate
        yield (
            f"{backend}, {rate / 1e9:.0f} G/s",
            phase,
            f"{counted[phase] / 1e9:.0f}",
            f"{products:.2f}",
            f"{seconds:.2f}",
            f"{seconds / products:.2f}" if products else "",
            f"{(seconds - products) / found['step']['seconds']:.0%}",
        )


COLUMNS = (
    "backend, rate of products", "phase", "10^9 operations", "products, s",
    "measured, s", "times", "the rest, of the step",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--backends", nargs="+", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--rate", action="store_true", help="alone, in this process")
    parser.add_argument("--results", help="write results/<name>.json and .md")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in SHAPE}
    if arguments.rate:
        print(json.dumps(measure_rate(shape)))
        return
    found, rows, counted = {}, [], operations(shape)
    for backend in arguments.backends:
        found[backend] = measure_all(backend, shape)
        rows += rows_of(backend, found[backend], counted)
        print(*rows[-len(PHASES) :], sep="\n", flush=True)
    text = harness.table(COLUMNS, rows)
    if not arguments.results:
        print(text)
        return
    given = [f"--{k} {v}" for k, v in shape.items() if v != SHAPE[k]]
    command = ["python benchmarks/budget.py --backends", *arguments.backends, *given]
    kept = {"shape": shape, "operations": counted, "found": found}
    harness.write_results(arguments.results, " ".join(command), text, kept)


if __name__ == "__main__":
    main()
