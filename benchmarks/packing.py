"""Packing speed: tokens per second on one core, tokenizing left out.

    python benchmarks/packing.py

Documents are random token ids with log-normal lengths (median 245), as code files
and web pages roughly have.
"""

import os
import platform
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

from keras_ebft.data import pack

LENGTHS = (128, 1024, 4096)


def make_documents(count=30_000):
    """Random documents of 1 to 8000 tokens."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(5.5, 1.2, count), 1, 8000).astype(int)
    return [random.integers(1, 1000, size, dtype="int32") for size in sizes]


def seconds_to_pack(stream):
    """Reads a stream to its end."""
    start = time.perf_counter()
    for _ in stream.blocks():
        pass
    return time.perf_counter() - start


def measure(name, documents, length, strategy):
    """Prints the best of three passes as a line of a table."""
    stream = pack(documents, None, length, strategy=strategy)
    seconds = min(seconds_to_pack(stream) for _ in range(3))
    report = stream.report
    speed = report.tokens / seconds / 1e6
    print(
        f"| {name} | {length} | {strategy} | {speed:.1f} | {report.fill_rate:.1%} |",
        flush=True,
    )


def main():
    """Prints a table."""
    print(f"Python {platform.python_version()}, NumPy {np.__version__}\n")
    print("| documents | length | strategy | million tokens/s | fill rate |")
    print("|---|---|---|---|---|")
    documents = make_documents()
    for length in LENGTHS:
        for strategy in ("in_order", "best_fit"):
            measure("30 000, mixed", documents, length, strategy)
    tiny = [document[:12] for document in documents] * 10
    measure("300 000 of at most 12 tokens", tiny, 1024, "best_fit")
    measure("one of 10 million tokens", [np.arange(10_000_000)], 1024, "best_fit")


if __name__ == "__main__":
    main()
