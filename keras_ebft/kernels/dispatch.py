"""Which implementation of a hot path runs: chosen by record.

Each path has a list of `Implementation` records, best first. A call runs the first
whose record covers it: backend, device, dtypes, head size, options and installed
packages. What is marked as unproven comes first only where `qualification` has found
it right and faster, on this device. `set_implementation` and the environment variable
`KERAS_EBFT_KERNELS` force one; what is forced runs or raises.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from keras_ebft.backend.device import device_name, device_of
from keras_ebft.backend.gradients import forget_programs
from keras_ebft.backend.runtime import backend_name

ENVIRONMENT_VARIABLE = "KERAS_EBFT_KERNELS"
BACKENDS = ("jax", "tensorflow", "torch")
# What `KERAS_EBFT_KERNELS` takes besides `op=name`: nothing unproven is checked or
# runs; what was found before is forgotten; it is said again where warnings go.
WORDS = ("off", "clear", "show")


@dataclass(frozen=True)
class Call:
    """What a choice depends on.

    Attributes:
        op: str, the path.
        backend: str, the Keras backend.
        device: `Device`.
        dtypes: frozenset of dtype names of the floating-point arguments.
        head_size: int, width of an attention head, or `None`.
        options: frozenset of names of the options in use.
    """

    op: str
    backend: str
    device: Any
    dtypes: frozenset
    head_size: Any = None
    options: frozenset = frozenset()


@dataclass(frozen=True)
class Implementation:
    """What one implementation of a path supports.

    Attributes:
        name: str, as `set_implementation` takes it.
        target: `"module:function"`, imported when it first runs. The function has
            the signature of the path.
        backends: tuple of Keras backends.
        platforms: tuple of device platforms that it is chosen on, see `Device`;
            `None` for all.
        forced_platforms: tuple of further platforms where it runs only if forced,
            as through an interpreter.
        makers: tuple of makers of CPUs that it is chosen on, see `Device`; `None`
            for all.
        min_capability: smallest CUDA compute capability `(major, minor)`.
        dtypes: tuple of dtype names, one for all floating-point arguments of a
            call; `None` for any, mixed ones too.
        head_sizes: container of ints, or `None` for all.
        options: tuple of names of supported options; `None` for all.
        packages: tuple of Python packages that must be installed.
        unproven: bool, whether it has not been proven on its hardware yet: it is
            chosen automatically only where it has qualified.
    """

    name: str
    target: str
    backends: tuple = BACKENDS
    platforms: Any = None
    forced_platforms: tuple = ()
    makers: Any = None
    min_capability: Any = None
    dtypes: Any = None
    head_sizes: Any = None
    options: Any = None
    packages: tuple = ()
    unproven: bool = False

    def refusal(self, call, forced=False, qualified=False):
        """Why a call cannot run, as a phrase after "it needs"; `None` if it can."""
        if self.unproven and not (forced or qualified):
            return "to qualify on this device, or to be forced"
        if call.backend not in self.backends:
            return f"the backend {_one_of(self.backends)}, not {call.backend}"
        missing = [name for name in self.packages if not _is_installed(name)]
        if missing:
            return f"the package {' and '.join(missing)}, which is not installed"
        return self._device_refusal(call.device, forced) or self._tensor_refusal(call)

    def _device_refusal(self, device, forced):
        if self.platforms is not None:
            allowed = self.platforms + (self.forced_platforms if forced else ())
            if device.platform not in allowed:
                return f"a device of kind {_one_of(allowed)}, not {device.platform}"
        if self.makers is not None and not forced and device.maker not in self.makers:
            return f"a processor of {_one_of(self.makers)}, or to be forced"
        least, capability = self.min_capability, device.capability
        if least is not None and capability is not None and capability < least:
            return f"compute capability {least} or more, not {capability}"
        return None

    def _tensor_refusal(self, call):
        if self.dtypes is not None:
            dtypes = sorted(call.dtypes)
            if len(dtypes) != 1 or dtypes[0] not in self.dtypes:
                return f"one dtype of {_one_of(self.dtypes)}, not {', '.join(dtypes)}"
        if self.head_sizes is not None and call.head_size not in self.head_sizes:
            return f"a head size in {self.head_sizes}, not {call.head_size}"
        if self.options is not None:
            unknown = sorted(call.options - set(self.options))
            if unknown:
                return f"a call without {', '.join(unknown)}"
        return None

    def load(self):
        """The function itself."""
        return _load(self.target)


_registry = {}
_forced = {}
_watchers = []


def register(op, implementations):
    """Makes the implementations of a path known, best first.

    Args:
        op: str, the path.
        implementations: tuple of `Implementation`. The last one must run always.

    Raises:
        ValueError: for a name given twice.
    """
    names = [implementation.name for implementation in implementations]
    if len(set(names)) != len(names):
        raise ValueError(f"Expected different names. Received: {names} for {op!r}.")
    _registry[op] = tuple(implementations)
    _select.cache_clear()
    _candidates.cache_clear()


def implementations(op):
    """The `Implementation` records of a path, best first.

    Raises:
        ValueError: for an unknown path.
    """
    if op not in _registry:
        raise ValueError(
            f"Expected `op` to be one of {sorted(_registry)}. Received: {op!r}."
        )
    return _registry[op]


def set_implementation(op: str, name: str | None) -> None:
    """Forces an implementation of a path, or returns to the automatic choice.

    What is compiled already stays as it is: call this before `fit`, or `compile`
    the model anew. It has precedence over `KERAS_EBFT_KERNELS`.

    Args:
        op: `"causal_attention"`, `"strided_attention"`, `"linear_logprob"`,
            `"linear_sample"`, `"feature_reward"` or `"projection"`.
        name: str, one of its implementations; see `docs/kernels.md`. `None` for
            the automatic choice.

    Raises:
        ValueError: for an unknown path or name. A path that runs raises one if
            the implementation cannot do what is asked of it.

    Example:
    >>> set_implementation("linear_logprob", "reference")
    >>> set_implementation("linear_logprob", None)
    """
    implementations(op)
    if name is not None:
        _find(op, name, "set_implementation")
    # Programs of single calls hold what was chosen within them.
    forget_programs()
    if name is None:
        _forced.pop(op, None)
    else:
        _forced[op] = name


def choose(op, tensors, head_size=None, options=(), settings=None):
    """The function that runs a call.

    Args:
        op: str, the path.
        tensors: tuple of floating-point tensors or variables, first the one whose
            device counts; `None` among them is left out.
        head_size: int, width of an attention head, or `None`.
        options: names of the options in use, see `in_use`.
        settings: dict of the call's arguments that are no tensors, for what is not
            proven to be tried with.

    Returns:
        A function with the signature of the path.

    Raises:
        ValueError: if a forced implementation does not support the call.
    """
    options = frozenset(options)
    if keras.distribution.distribution() is not None:
        options |= {"distribution"}
    call = Call(
        op,
        backend_name(),
        device_of(tensors[0]),
        frozenset(
            keras.backend.standardize_dtype(tensor.dtype)
            for tensor in tensors
            if tensor is not None
        ),
        head_size,
        options,
    )
    name, source = _forced.get(op), "set_implementation"
    if name is None:
        requested = parse_environment(os.environ.get(ENVIRONMENT_VARIABLE, ""))
        name, source = requested.get(op), ENVIRONMENT_VARIABLE
    chosen = _select(call, name, source)
    if name is None and _candidates(call):
        chosen = _qualified(call, tensors, settings or {}) or chosen
    for watcher in _watchers:
        watcher.setdefault(op, set()).add(chosen.name)
    return chosen.load()


def requested_implementations():
    """What is forced now, in code and by the environment, as something hashable."""
    return *_forced.items(), os.environ.get(ENVIRONMENT_VARIABLE, "")


def in_use(**options):
    """Names of the options whose value is not `None` or `False`."""
    return frozenset(
        name
        for name, value in options.items()
        if value is not None and value is not False
    )


@contextlib.contextmanager
def watch_choices() -> Iterator[dict[str, set[str]]]:
    """Context that yields a dict, filled with the implementations that are chosen.

    Compiled functions choose when they are traced, not when they run again.

    Yields:
        dict of path -> set of names.
    """
    choices = {}
    _watchers.append(choices)
    try:
        yield choices
    finally:
        # By identity: equal dicts may be watching too.
        _watchers[:] = [w for w in _watchers if w is not choices]


@functools.lru_cache
def parse_environment(value):
    """`"op=name,op=name"` as a dict; `WORDS` among them are passed over.

    Raises:
        ValueError: for anything else, and unknown paths and names.
    """
    requested = {}
    for item in _items(value):
        if item in WORDS:
            continue
        op, equals, name = (part.strip() for part in item.partition("="))
        if not equals or op not in _registry:
            raise ValueError(
                f"Expected {ENVIRONMENT_VARIABLE} to be like "
                '"linear_logprob=reference,strided_attention=blockwise", with paths '
                f"{sorted(_registry)}, or one of {WORDS}. Received: {value!r}."
            )
        _find(op, name, ENVIRONMENT_VARIABLE)
        requested[op] = name
    return requested


def environment_words():
    """Those of `WORDS` that `KERAS_EBFT_KERNELS` holds."""
    return set(_items(os.environ.get(ENVIRONMENT_VARIABLE, ""))) & set(WORDS)


def _items(value):
    return list(filter(None, (part.strip() for part in value.split(","))))


@functools.lru_cache
def _candidates(call):
    """Unproven implementations that come before the one that runs without them."""
    found = []
    for implementation in _registry[call.op]:
        if implementation.refusal(call) is None:
            break
        if implementation.refusal(call, qualified=True) is None:
            found.append(implementation)
    return tuple(found)


def _qualified(call, tensors, settings):
    """The first candidate that is right and faster here, or `None`."""
    words = environment_words()
    if "off" in words:
        return None
    # Where nothing is to be proven, nothing of it is imported.
    from keras_ebft.kernels import qualification

    shapes = tuple(None if t is None else tuple(t.shape) for t in tensors)
    for candidate in _candidates(call):
        trial = trial_of(call, candidate, device_name(tensors[0]), shapes, settings)
        if trial is not None and qualification.passes(trial, words):
            return candidate
    return None


def trial_of(call, candidate, device, shapes, settings):
    """A `Trial` of an implementation against what runs without it, or `None`."""
    from keras_ebft.kernels.qualification import Trial

    others = _select(call, None, None), _registry[call.op][-1]
    return Trial.of(call, candidate, *others, device, shapes, settings)


@functools.lru_cache
def _select(call, name, source):
    if name is not None:
        return _check_forced(call, name, source)
    return next(i for i in _registry[call.op] if i.refusal(call) is None)


def _check_forced(call, name, source):
    implementation = _find(call.op, name, source)
    refusal = implementation.refusal(call, forced=True)
    if refusal is None:
        return implementation
    able = [i.name for i in _registry[call.op] if i.refusal(call, True) is None]
    raise ValueError(
        f"Expected the implementation of {call.op} forced by {source} to support the "
        f"call. Received: {name!r}, but it needs {refusal}. Force one of {able}, or "
        "leave the choice to the library."
    )


def _find(op, name, source):
    for implementation in implementations(op):
        if implementation.name == name:
            return implementation
    names = [implementation.name for implementation in _registry[op]]
    raise ValueError(
        f"Expected {source} to name an implementation of {op}, one of {names}. "
        f"Received: {name!r}."
    )


@functools.lru_cache
def _load(target):
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


@functools.lru_cache
def _is_installed(package):
    return importlib.util.find_spec(package) is not None


def _one_of(names):
    return " or ".join(names)
