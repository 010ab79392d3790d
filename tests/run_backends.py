"""Runs the whole suite once per backend; sums up and names what failed at the end.

    python tests/run_backends.py [--slow] jax torch tensorflow

XLA runs with most of its optimizations off: they take longer than the tests. Users
have them on, so the tests that guard numbers (marked `numbers`) run a second time with
all of them, where XLA compiles them.

Two backends run at a time: most of the time goes into compiling, one program
after the other, which leaves the second core idle.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2


# What runs again with XLA's optimizations on. TensorFlow compiles with XLA only where
# it is asked to, and PyTorch never does.
OPTIMIZED = {"jax": "numbers", "tensorflow": "numbers and xla"}


def environment(backend, cache, optimized=False):
    """What the suite runs under: tiny programs, many of them, each run once."""
    unoptimized = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # The same for what TensorFlow compiles.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false",
    }
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Threads of their own would only fight over the cores.
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        **({} if optimized else unoptimized),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def run(backend, markers, optimized, cache):
    """Runs pytest under one backend; returns `(exit code, summary)`."""
    name = f"{backend}, optimized" if optimized else backend
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--durations=10", "-m", markers],
        cwd=ROOT,
        env=environment(backend, cache, optimized),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"=== {name} ===\n{process.stdout}", flush=True)
    summaries = re.findall(
        r"^=* ?(\d+ (?:passed|failed|error|deselected).*?) in ", process.stdout, re.M
    )
    counts = summaries[-1] if summaries else "no tests ran"
    failures = re.findall(r"^(?:FAILED|ERROR) .*", process.stdout, re.M)
    line = f"{name}: {counts} ({time.monotonic() - start:.0f} s)"
    return process.returncode, "\n".join([line, *failures])


def markers_of(backend, backends, slow):
    """Which tests a backend runs: what has no tensors runs under the first."""
    chosen = [] if slow else ["not slow"]
    if backend != backends[0]:
        chosen.append("not backend_independent")
    return " and ".join(chosen)


def runs(backends, slow):
    """`(backend, markers, optimized)` of every run, the longest first."""
    for backend in backends:
        yield backend, markers_of(backend, backends, slow), False
    for backend in backends:
        # Those that TensorFlow compiles with XLA are slow ones all.
        if backend in OPTIMIZED and (slow or backend == "jax"):
            chosen = [OPTIMIZED[backend], *([] if slow else ["not slow"])]
            yield backend, " and ".join(chosen), True


def main():
    slow = "--slow" in sys.argv[1:]
    backends = [argument for argument in sys.argv[1:] if argument != "--slow"]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(run, *one, cache) for one in runs(backends, slow)]
        results = [future.result() for future in running]
    print("\n".join(summary for _, summary in results))
    sys.exit(any(code for code, _ in results))


if __name__ == "__main__":
    main()
