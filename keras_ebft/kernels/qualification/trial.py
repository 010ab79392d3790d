"""What is tried, and what came of it."""

import functools
import hashlib
import importlib
import importlib.util
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import keras

from keras_ebft.backend.measuring import product_precision
from keras_ebft.version import __version__

# Whose versions a verdict depends on, by backend.
PACKAGES = {
    "jax": (
        "jax",
        "jaxlib",
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
        "nvidia-cudnn-cu12",
        "nvidia-cudnn-cu13",
        "libtpu",
    ),
    "torch": ("torch", "triton"),
    "tensorflow": ("tensorflow",),
}
# What can be written down of a call.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Trial:
    """One implementation for one call, against what would run without it.

    Attributes:
        op: str, the path.
        name: str, the implementation that is tried.
        target: str, its function, as in its `Implementation`.
        plain_name: str, the implementation that runs otherwise.
        plain_target: str, its function.
        definition_target: str, the function of the plain definition.
        backend: str, the Keras backend.
        device: str, the model of the device.
        dtype: str, dtype of all floating-point tensors.
        options: tuple of names of the options in use.
        shapes: tuple of shapes of the call's tensors, `None` for one left out.
        settings: tuple of `(name, value)`, the arguments that are no tensors.
        precision: what products of float32 are set to.
    """

    op: str
    name: str
    target: str
    plain_name: str
    plain_target: str
    definition_target: str
    backend: str
    device: str
    dtype: str
    options: tuple
    shapes: tuple
    settings: tuple
    precision: Any

    @classmethod
    def of(cls, call, candidate, plain, definition, device, shapes, settings):
        """The trial of a candidate for a call; `None` where its shapes are unknown.

        Args:
            call: `Call`.
            candidate: `Implementation` that is tried.
            plain: `Implementation` that runs otherwise.
            definition: `Implementation`, the plain definition.
            device: str, the model of the device.
            shapes: tuple of shapes of the call's tensors, `None` for one left out.
            settings: dict of its arguments that are no tensors.
        """
        sizes = [size for shape in shapes for size in shape or ()]
        if not all(isinstance(size, int) for size in sizes) or len(call.dtypes) != 1:
            return None
        if not all(isinstance(value, PLAIN) for value in settings.values()):
            return None
        return cls(
            call.op,
            candidate.name,
            candidate.target,
            plain.name,
            plain.target,
            definition.target,
            call.backend,
            device,
            *call.dtypes,
            tuple(sorted(call.options)),
            shapes,
            tuple(sorted(settings.items())),
            product_precision(),
        )

    @classmethod
    def from_dict(cls, values):
        """A trial that `as_dict` wrote down, also by way of JSON."""
        tupled = {name: _tupled(value) for name, value in values.items()}
        return cls(**tupled)

    def against_definition(self):
        """The trial of the same implementation against the plain definition."""
        return replace(
            self, plain_name="reference", plain_target=self.definition_target
        )

    def as_dict(self):
        """What `from_dict` takes; JSON can hold it."""
        return asdict(self)

    def specs(self):
        """`(checks, timing)`: small specs, and one that is shaped like the call."""
        module = importlib.import_module(f"keras_ebft.kernels.{self.op}.specs")
        return module.like(self.shapes, frozenset(self.options), dict(self.settings))

    def key(self):
        """What a verdict depends on: a dict that JSON can hold.

        Sizes count as the next power of two; floats do not change what runs.
        """
        values = self.as_dict()
        values["head_size"] = self.shapes[0][-1]
        values["shapes"] = [_sized(shape) for shape in self.shapes]
        values["settings"] = [
            [name, _sized(value)]
            for name, value in self.settings
            if not isinstance(value, float)
        ]
        values["versions"] = versions(self.backend)
        values["code"] = _code_digest(self.target)
        return values


@dataclass(frozen=True)
class Verdict:
    """What came of a trial.

    Attributes:
        outcome: `"faster"` (and right), `"slower"`, `"wrong"`, `"failed"`, `"hung"`,
            or `"unchecked"` where the kernel is not to blame.
        detail: str, what went wrong.
        what: str, the output or gradient that was furthest off.
        error: float, by how much.
        allowed: float, how much it may be off.
        times: dict from what was timed to `[its, the other's]` milliseconds.
    """

    outcome: str
    detail: str = ""
    what: str = ""
    error: float | None = None
    allowed: float | None = None
    times: Any = None

    @property
    def is_final(self):
        """Whether it says something about the kernel."""
        return self.outcome != "unchecked"

    @property
    def is_usual(self):
        """Whether the kernel is right."""
        return self.outcome in ("faster", "slower")

    def numbers(self):
        """How far off it was, and how fast, as a phrase."""
        found = []
        if self.error is not None:
            found.append(
                f"{self.what} is off by {self.error:.1e} of {self.allowed:.1e} allowed"
            )
        for what, (own, other) in (self.times or {}).items():
            found.append(f"{what} {own:.3g} ms against {other:.3g} ms")
        return ", ".join(found)

    def sentence(self, trial):
        """For the log: what runs, and why."""
        is_chosen = self.outcome == "faster"
        chosen, other = trial.name, trial.plain_name
        if not is_chosen:
            chosen, other = other, chosen
        why = {
            "faster": "is right and faster",
            "slower": "is right and not faster",
            "wrong": "is wrong",
            "failed": f"fails ({self.detail})",
            "hung": f"hangs ({self.detail})",
            "unchecked": f"could not be tried here ({self.detail}); `python -m "
            "keras_ebft.kernels` tries it while nothing else uses the device",
        }[self.outcome]
        text = f"{trial.op} runs {chosen}, not {other}, on {trial.device}"
        numbers = f": {self.numbers()}" if self.numbers() else ""
        return f"{text}: {trial.name} {why}{numbers}."


def versions(backend):
    """Of the library, Keras and what runs kernels: dict from names to versions."""
    found = {"keras_ebft": __version__, "keras": keras.__version__}
    for name in PACKAGES[backend]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # Not there, or part of another package, whose version counts then.
            continue
    return found


def _sized(value):
    """A structure whose integers are the next power of two."""
    if isinstance(value, tuple):
        return [_sized(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return 1 << max(value - 1, 0).bit_length()
    return value


def _tupled(value):
    return tuple(map(_tupled, value)) if isinstance(value, (list, tuple)) else value


@functools.lru_cache
def _code_digest(target):
    """Of the code of all kernels, and of the module that holds the target."""
    module = importlib.util.find_spec(target.split(":")[0])
    paths = [*Path(__file__).parents[1].rglob("*.py"), Path(module.origin)]
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
