"""The running interpreter's standard library as source files with a split each."""

import platform
import sysconfig
import tokenize
import zlib
from pathlib import Path

LICENCE = "Python Software Foundation License Version 2"
# Installed packages are no part of the standard library.
INSTALLED = {"site-packages", "dist-packages"}
TESTS = {"test", "tests", "idle_test"}


def version():
    """The interpreter's version, which decides the data."""
    return platform.python_version()


def source_files(with_tests):
    """Yields `(path relative to the standard library, absolute path)`, sorted.

    Args:
        with_tests: bool, whether the standard library's own tests are included.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = INSTALLED if with_tests else INSTALLED | TESTS
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if path.is_file() and not skipped.intersection(relative.parts):
            yield relative.as_posix(), path


def read_source(path):
    """The text of a Python file in the encoding it declares, `None` if broken."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def split_of(key):
    """The split of a file or text: one in ten for validation, one for testing."""
    place = zlib.crc32(key.encode("utf-8")) % 10
    return {0: "validation", 1: "test"}.get(place, "train")


def by_split(keys):
    """A dict from the names of the splits that are not empty to their keys."""
    splits = {}
    for key in keys:
        splits.setdefault(split_of(key), []).append(key)
    return splits
