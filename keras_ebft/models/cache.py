"""Folders that are made once and kept in the user's cache folder."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def cache_folder():
    """`keras_ebft` in the user's cache folder."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "keras_ebft"


def cached_folder(name, write):
    """A folder of this name, made if it does not exist.

    It is written beside its place and moved there when it is complete, so that
    no one ever sees half of it.

    Args:
        name: str.
        write: function of the path of an empty folder, fills it.

    Returns:
        `pathlib.Path`.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        write(beside)
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _move(beside, folder):
    try:
        beside.rename(folder)
    except OSError:
        # Another process was quicker: its folder is as good.
        if not folder.is_dir():
            raise


def check_sha256(path, expected):
    """Raises a `ValueError` unless a file has the SHA-256 it should have."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"Expected {path} with the SHA-256 {expected}. Received: "
            f"{digest.hexdigest()}. "
            "The file is damaged or of another version: install it again."
        )
