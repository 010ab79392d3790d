"""The output folder of a run: all that it takes to resume it, and to repeat it."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import keras
import keras_hub
import yaml

import keras_ebft
from keras_ebft.backend.runtime import backend_name
from keras_ebft.cli.settings import RunSettings, check_settings, read_settings

# What was drawn or planned when a run began.
KEPT = ("seed", "schedule_epochs")


class RunFolder:
    """Where a run keeps its files.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings_file = self.path / "run.yaml"
        self.checkpoint = self.path / "latest.weights.h5"
        self.weights = self.path / "final.weights.h5"
        self.preset = self.path / "preset"
        self.history = self.path / "history.json"
        self.versions = self.path / "versions.json"
        self._finished = self.path / "finished.json"

    def read_settings(self, overrides: Any = ()) -> RunSettings:
        """The settings of the run, resolved, with some replaced.

        Raises:
            FileNotFoundError: if there is no run here.
            ValueError: for an override that is unknown.
        """
        if not self.settings_file.is_file():
            raise FileNotFoundError(
                f"Expected the output folder of a run, with {self.settings_file.name}. "
                f"Received: '{self.path}'. Train first: keras-ebft train run.yaml."
            )
        return check_settings(read_settings(self.settings_file, overrides))

    def read_history(self) -> dict[str, list[float]]:
        """What was measured, epoch by epoch; NaN where it was not.

        Raises:
            FileNotFoundError: if no epoch has ended.
        """
        if not self.history.is_file():
            raise FileNotFoundError(
                f"Expected measurements in '{self.path}'. Received: none, because no "
                "epoch of a run has ended there. Train first: keras-ebft train."
            )
        history = json.loads(self.history.read_text("utf-8"))
        return {
            name: [math.nan if value is None else value for value in values]
            for name, values in history.items()
            if name != "epoch"
        }

    def claim(self, said: dict[str, Any]) -> None:
        """Writes down a run that begins, or makes sure that it is the one that is here.

        Args:
            said: resolved settings.

        Raises:
            ValueError: if the folder holds another run that has trained.
        """
        if self._holds_training():
            changed = _differences(self._written(), said)
            if changed:
                raise ValueError(
                    f"Expected the run that '{self.path}' holds, to resume it. "
                    f"Received another: {'; '.join(changed)}. Start it as it was, or "
                    "choose another `output`."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.settings_file, yaml.safe_dump(said, sort_keys=False))
        _write_json(self.versions, versions())

    def is_finished(self, epochs: int) -> bool:
        """Whether so many epochs were done, or a callback ended the run before."""
        if not self._finished.is_file():
            return False
        return json.loads(self._finished.read_text("utf-8"))["epochs"] >= epochs

    def finish(self, epochs: int) -> None:
        """Notes that the run has ended."""
        _write_json(self._finished, {"epochs": epochs})

    def written_training(self) -> dict[str, int]:
        """What the run that is here has of `KEPT`; nothing without one."""
        if not self._holds_training():
            return {}
        training = self._written()["training"]
        return {name: training[name] for name in KEPT}

    def _holds_training(self) -> bool:
        """Whether training has left anything that could be resumed."""
        left = (self.checkpoint, self.weights, self.history)
        return self.settings_file.is_file() and any(file.is_file() for file in left)

    def _written(self) -> dict[str, Any]:
        written = yaml.safe_load(self.settings_file.read_text("utf-8"))
        training = written["training"]
        # Files of earlier versions do not have it.
        training.setdefault("schedule_epochs", training["epochs"])
        return written


class HistoryFile(keras.callbacks.Callback):
    """Writes the logs of every epoch to a JSON file, as `History` holds them.

    It comes before what saves weights: an epoch that is trained again after an
    interruption replaces what was written of it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the epoch's logs."""
        rows = [row for row in self._rows() if row["epoch"] < epoch + 1]
        rows.append({"epoch": epoch + 1, **{n: float(v) for n, v in logs.items()}})
        names = dict.fromkeys(name for row in rows for name in row)
        history = {name: [row.get(name) for row in rows] for name in names}
        _write_json(self.path, history)

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        history = json.loads(self.path.read_text("utf-8"))
        return [dict(zip(history, values)) for values in zip(*history.values())]


def versions() -> dict[str, str]:
    """What a run depends on beside its settings."""
    backend = backend_name()
    return {
        "python": platform.python_version(),
        "keras_ebft": keras_ebft.__version__,
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "backend": backend,
        backend: _version(backend),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _differences(written: Any, said: Any, place: str = "") -> list[str]:
    """What is otherwise, but for the number of epochs, which may grow."""
    if place in ("training.epochs", "training.verbose", "training.progress"):
        return []
    if not (isinstance(written, dict) and isinstance(said, dict)):
        same = written == said
        return [] if same else [f"{place}={said!r} in place of {written!r}"]
    found = []
    for name in dict.fromkeys([*written, *said]):
        path = f"{place}.{name}" if place else name
        found += _differences(written.get(name), said.get(name), path)
    return found


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)
