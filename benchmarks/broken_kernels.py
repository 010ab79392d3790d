"""What the log says of good and broken kernels, each tried in a real process.

    KERAS_BACKEND=torch python benchmarks/broken_kernels.py

The kernels are those of `tests/stand_in_kernels.py`: for the CPU, one right and fast
and the others broken, each in its own way. Verdicts go to a folder that is thrown away.
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
# The process that makes trials finds them, too.
sys.path.insert(0, str(TESTS))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))
)
# Those that hang or end their process come last: another is started afterwards.
KERNELS = {
    "good": "right, and what runs in its place is slow",
    "slow": "right, after a product that nobody needs",
    "wrong_output": "entropy a thousandth too large",
    "wrong_gradient": "gradient by the head a thousandth too large",
    "wrong_where_large": "right at every size but the call's own",
    "unwritten": "leaves a row of its output unwritten",
    "raising": "raises an error",
    "out_of_memory": "runs out of memory",
    "crashing": "ends the process",
    "hanging": "never returns",
}
ROWS = 401


def register(kernel):
    """The kernel ahead of all others, as an unproven one."""
    from keras_ebft import kernels
    from keras_ebft.kernels import dispatch

    records = [
        dispatch.Implementation(
            kernel, f"stand_in_kernels:{kernel}", platforms=("cpu",), unproven=True
        )
    ]
    if kernel == "good":
        records.append(dispatch.Implementation("plain", "stand_in_kernels:plain"))
    dispatch.register(
        "linear_logprob", (*records, *kernels.implementations("linear_logprob"))
    )


def call():
    """Runs the path; returns the name of what was chosen."""
    from keras import ops

    from keras_ebft import kernels

    with kernels.watch_choices() as choices:
        labels = ops.zeros((ROWS,), "int32")
        kernels.linear_logprob(ops.ones((ROWS, 8)), ops.ones((9, 8)), labels)
    (name,) = choices["linear_logprob"]
    return name


def main():
    """Tries all kernels, one after another."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
    logging.getLogger("keras_ebft").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        from keras_ebft.kernels import dispatch

        registry = dict(dispatch._registry)
        for kernel, fault in KERNELS.items():
            dispatch._registry.clear()
            dispatch._registry.update(registry)
            register(kernel)
            print(f"\n# {kernel}: {fault}")
            start = time.monotonic()
            name = call()
            print(f"ran {name}, after {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
