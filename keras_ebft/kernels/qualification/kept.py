"""What trials gave, kept in the user's cache folder: one small file each."""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from keras_ebft.kernels.qualification.trial import Trial, Verdict
from keras_ebft.models.cache import cache_folder

# How long a kernel is held to be broken: a driver or a compiler that was to blame, and
# that no version names, may be mended.
SECONDS_BROKEN = 7 * 24 * 3600


def folder():
    """Where verdicts are kept: `keras_ebft/kernels` in the user's cache folder."""
    return cache_folder() / "kernels"


def read(trial):
    """The verdict that was kept of a trial, or `None`.

    A damaged file is none, and so is one that has held a kernel to be broken for a
    week.
    """
    path = _path(trial.key())
    verdict = _read(path)[1]
    if verdict is None or verdict.is_usual:
        return verdict
    age = time.time() - path.stat().st_mtime
    return verdict if age < SECONDS_BROKEN else None


def write(trial, verdict):
    """Keeps a verdict: written beside its place and moved there.

    Raises:
        OSError: where the folder cannot be written to.
    """
    path = _path(trial.key())
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"trial": trial.as_dict(), "verdict": vars(verdict), "key": trial.key()}
    handle, beside = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file, indent=1)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def entries():
    """All that is kept: list of `(Trial, Verdict)`, in the order of the paths."""
    found = [_read(path) for path in folder().glob("*.json")]
    found = [entry for entry in found if entry[1] is not None]
    return sorted(found, key=lambda entry: repr(entry[0]))


def clear():
    """Forgets all; returns how many verdicts there were."""
    paths = list(folder().glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _path(key):
    text = json.dumps(key, sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(path):
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return Trial.from_dict(entry["trial"]), Verdict(**entry["verdict"])
    except (OSError, ValueError, TypeError, KeyError):
        # Not there, cut, or of another version: the trial is made again.
        return None, None
