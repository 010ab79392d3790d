"""Runs the whole suite once per backend and sums up with one line for each."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(backend, cache):
    """Runs pytest under one backend; returns `(exit code, summary line)`."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # The suite compiles many small programs, some more than once, and runs
        # each a few times.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    print(f"=== {backend} ===", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--durations=5"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if re.search(r"\d+ (passed|failed|error)", line) else last
    code = process.wait()
    counts = re.sub(r"[= \n]+$|^[= ]+", "", last) or "no tests ran"
    return code, f"{backend}: {counts} ({time.monotonic() - start:.0f} s)"


def main():
    with tempfile.TemporaryDirectory() as cache:
        results = [run(backend, cache) for backend in sys.argv[1:]]
    print("\n".join(line for _, line in results))
    sys.exit(any(code for code, _ in results))


if __name__ == "__main__":
    main()
