"""The file of a training checkpoint: written whole, checked, and only for its run.

Beside what Keras writes, a file holds a record: what the run was, and a checksum of
everything else in it.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from keras_ebft.backend.updates import check_finite
from keras_ebft.training.reserved_files import ReservedFile, reserved

RECORD = "run_record"
# What was left by a process that was killed while writing. Nobody writes so long
# without a byte.
STALE_SECONDS = 3600
# Names and places of values, generously.
BYTES_PER_ENTRY = 4096


def previous_path(path: Path) -> Path:
    """Where the file before the last one is kept."""
    return path.with_name(f"previous-{path.name}")


def write_checkpoint(model: Any, path: Path, record: dict[str, Any]) -> None:
    """Writes a model's weights and a record, the file before them being kept.

    Written beside, in room that was taken before, flushed to disk, and moved to its
    place: whenever the machine stops, `path` is one whole file, the old one or the
    new one.

    Args:
        model: `EBFTModel`.
        path: path of the file.
        record: dict that JSON can hold.

    Raises:
        FloatingPointError: if a weight is not finite; nothing is written.
        OSError: if the disk is full, or cannot be written to.
    """
    check_finite(model.written_variables(), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = most_bytes(model, record)
    _check_space(path, size)
    with _moved_into_place(path) as partial:
        with reserved(partial, size) as file:
            model.save_weights(file, overwrite=True)
            _add_record(file, record)
        if path.exists():
            with _moved_into_place(previous_path(path)) as other:
                _link(path, other)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a file, whose contents are checked against it.

    Args:
        path: path of a file that exists.

    Returns:
        dict, or `None` for a file of an earlier version, which has none.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            if RECORD not in file:
                return None
            content = json.loads(bytes(file[RECORD][()]))
            checksum = _checksum(file)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if checksum != content["checksum"]:
        raise _damaged(path, "contents that its checksum does not belong to")
    return content["run"]


def remove_stale(path: Path) -> None:
    """Removes what killed processes left of their writing to a path."""
    for partial in path.parent.glob(f"partial-*{path.name}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()


def stamp(path: Path) -> tuple[int, ...] | None:
    """What tells one file at a path from another; `None` where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def differences(written: Any, now: Any, name: str = "") -> Iterator[str]:
    """How one record differs from another, by the names of the entries.

    Args:
        written: nested dict, out of a file.
        now: nested dict of the same kind.
        name: str, where both stand.

    Yields:
        str, one entry that differs, with both values.
    """
    if not (isinstance(written, dict) and isinstance(now, dict)):
        if written != now:
            yield f"{name} was {_short(written)} and is {_short(now)}"
        return
    for key in sorted({*written, *now}):
        inner = f"{name} {key}".strip()
        yield from differences(written.get(key), now.get(key), inner)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(path: Path, reason: str) -> ValueError:
    previous = previous_path(path)
    advice = "Delete it to train anew."
    if previous.exists():
        advice = (
            f"The checkpoint before it is {previous}: move that to {path.name} to "
            "resume from there, or delete both to train anew."
        )
    return ValueError(
        f"Expected a whole checkpoint in {path}. Received: a damaged file "
        f"({reason}). {advice}"
    )


def most_bytes(model: Any, record: dict[str, Any]) -> int:
    """What the file of a checkpoint has at most.

    Args:
        model: `EBFTModel`.
        record: dict that JSON can hold.

    Returns:
        int, bytes.
    """
    variables = [
        *model.written_variables(),
        *model._saved_variables().values(),
        # Running means, with the model and with the state of training.
        *model.metrics_variables,
        *model.metrics_variables,
    ]
    values = sum(int(np.prod(v.shape)) * _bytes(v.dtype) for v in variables)
    return values + (len(variables) + 16) * BYTES_PER_ENTRY + len(json.dumps(record))


def _check_space(path: Path, needed: int) -> None:
    # Where files cannot be reserved, a disk that is full now is told all the same.
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"Expected {needed} free bytes for a checkpoint. Received: {free}. The "
            "checkpoint before is whole. Make room, and resume training",
            str(path),
        )


def _bytes(dtype: Any) -> int:
    """Bytes of one value: NumPy alone does not know "bfloat16" and its like."""
    digits = re.search(r"[0-9]+", keras.backend.standardize_dtype(dtype))
    return max(int(digits.group()) // 8, 1) if digits else 1


@contextlib.contextmanager
def _moved_into_place(path: Path) -> Iterator[Path]:
    """Context with a path of its own to write to, which becomes `path` at its end."""
    partial = path.with_name(f"partial-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Flushes a file or folder to disk; not every system lets folders be opened."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:
        # A file system without hard links.
        shutil.copyfile(path, other)


def _add_record(partial: ReservedFile, record: dict[str, Any]) -> None:
    with h5py.File(partial, "r+") as file:
        content = {"checksum": _checksum(file), "run": record}
        file[RECORD] = np.frombuffer(json.dumps(content).encode(), "uint8")


def _checksum(file: h5py.File) -> int:
    names: list[str] = []
    file.visititems(_names_of_data(names))
    checksum = 0
    for name in sorted(names):
        values = np.ascontiguousarray(file[name][()])
        described = f"{name} {values.dtype.str} {values.shape}".encode()
        checksum = zlib.crc32(described, checksum)
        checksum = zlib.crc32(values.reshape(-1).view("uint8"), checksum)
    return checksum


def _names_of_data(names: list[str]) -> Callable[[str, Any], None]:
    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name != RECORD:
            names.append(name)

    return visit
