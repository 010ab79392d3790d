"""Runs the whole suite once per backend; sums up and names what failed at the end.

    python tests/run_backends.py [--slow] jax torch tensorflow

XLA and TensorFlow's graphs run with most of their optimizations off: they take longer
than the tests. Users have them on, so the tests that guard numbers (marked `numbers`)
run with all of them, in a run of their own.

A process runs for each core, two at least, as far as memory goes: most of the time
goes into compiling, one program after the other, which leaves other cores idle. Each
takes a part of the files, so that no core waits for another in the end. What JAX
compiles is kept for the next time; `make clean` removes it.
"""

import collections
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# With the slow tests a process of TensorFlow comes to 8.
GIBIBYTES = 8
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
AT_ONCE = max(2, min(os.cpu_count() or 1, int(MEMORY / GIBIBYTES), 6))
PARTS = 3
NO_TESTS = 5
# Programs that JAX compiled, for all processes of a run and for later runs.
COMPILED = ROOT / ".pytest_cache" / "compiled"
KEPT_SECONDS = 7 * 24 * 3600


# Where the tests of numbers run with optimizations on; PyTorch runs op by op.
OPTIMIZED = ("jax", "tensorflow")


class Run(NamedTuple):
    """Some files under one backend."""

    backend: str
    markers: str
    files: list
    optimized: bool = False

    @property
    def name(self):
        return f"{self.backend}, optimized" if self.optimized else self.backend


class Result(NamedTuple):
    """What came of a run: tests that passed, failed and so on; lines of failures."""

    name: str
    code: int
    counts: collections.Counter
    failures: list
    seconds: float


def environment(backend, optimized=False):
    """What the suite runs under: tiny programs, many of them, each run once."""
    unoptimized = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # A twentieth of the time went into noting where operations come from.
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        # The same for what TensorFlow compiles.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false",
        # Read by `helpers.py`: TensorFlow itself has no variable for it.
        "UNOPTIMIZED_GRAPHS": "1",
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
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def execute(run):
    """Runs pytest; returns `Result`."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "--durations=10", "-m", run.markers]
    process = subprocess.run(
        [*command, *run.files],
        cwd=ROOT,
        env=environment(run.backend, run.optimized),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"=== {run.name} ===\n{process.stdout}", flush=True)
    counts, failures = read_summary(process.stdout)
    seconds = time.monotonic() - start
    return Result(run.name, process.returncode, counts, failures, seconds)


def read_summary(printed):
    """How many tests passed, failed and so on, and the lines that name failures."""
    summaries = re.findall(
        r"^=* ?(\d+ (?:passed|failed|skipped|error|deselected).*?) in ", printed, re.M
    )
    found = re.findall(r"(\d+) (\w+)", summaries[-1]) if summaries else []
    counts = collections.Counter({word: int(number) for number, word in found})
    return counts, re.findall(r"^(?:FAILED|ERROR) .*", printed, re.M)


def markers_of(backend, backends, slow, optimized=False):
    """Which tests a backend runs: what has no tensors runs under the first."""
    chosen = [] if slow else ["not slow"]
    if backend in OPTIMIZED:
        chosen.append("numbers" if optimized else "not numbers")
    if backend != backends[0]:
        chosen.append("not backend_independent")
    return " and ".join(chosen)


def runs(backends, slow):
    """Every run, the longest first."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py"))
    for backend in backends:
        markers = markers_of(backend, backends, slow)
        for part in range(PARTS):
            yield Run(backend, markers, files[part::PARTS])
    for backend in backends:
        if backend in OPTIMIZED:
            markers = markers_of(backend, backends, slow, optimized=True)
            yield Run(backend, markers, files, optimized=True)


def summary(name, results):
    """Lines about all runs of one name, and whether they went as they should."""
    counts = sum((result.counts for result in results), collections.Counter())
    seconds = sum(result.seconds for result in results)
    ran = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
    # A part in which nothing was chosen is none; a backend without a test is.
    well = counts["passed"] > 0 and all(r.code in (0, NO_TESTS) for r in results)
    failures = [line for result in results for line in result.failures]
    codes = sorted({result.code for result in results} - {0, NO_TESTS})
    if codes and not failures:
        failures = [f"pytest ended with {codes}, see above"]
    return [f"{name}: {ran or 'no tests ran'} ({seconds:.0f} s)", *failures], well


def remove_old(folder):
    """Removes programs that a change of the code has made useless, or soon will."""
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def main():
    slow = "--slow" in sys.argv[1:]
    backends = [argument for argument in sys.argv[1:] if argument != "--slow"]
    COMPILED.mkdir(parents=True, exist_ok=True)
    remove_old(COMPILED)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(execute, run) for run in runs(backends, slow)]
        results = [future.result() for future in running]
    all_well = True
    for name in dict.fromkeys(result.name for result in results):
        lines, well = summary(name, [r for r in results if r.name == name])
        print("\n".join(lines))
        all_well &= well
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"The largest process held {peak:.1f} GiB.")
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
