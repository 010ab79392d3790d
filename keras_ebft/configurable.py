"""Objects that show, and keep, the settings they were made with."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import keras

Self = TypeVar("Self", bound="Configurable")

MOST_CHARACTERS = 60
MOST_ENTRIES = 6


class Shown:
    """An object whose `repr` is the call that makes it.

    Settings are the constructor's arguments, as the object keeps them: under their
    names, or those with an underscore before. What it does not keep is left out.
    """

    def __repr__(self) -> str:
        return shown(type(self).__name__, self._shown_settings())

    def _shown_settings(self) -> dict[str, Any]:
        kept = vars(self)
        return {
            name: kept.get(name, kept.get(f"_{name}"))
            for name in inspect.signature(type(self)).parameters
            if name in kept or f"_{name}" in kept
        }


class Configurable(Shown):
    """An object that can be rebuilt from the arguments it was made with."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold.

        Raises:
            TypeError: of a class whose constructor has arguments, and which does not
                define this.
        """
        arguments = list(inspect.signature(type(self)).parameters)
        if not arguments:
            return {}
        raise TypeError(
            f"Expected {type(self).__name__} to define get_config(), returning its "
            f"constructor's arguments as a dict. Received: a class with the arguments "
            f"{', '.join(arguments)}, and without it."
        )

    @classmethod
    def from_config(cls: type[Self], config: dict[str, Any]) -> Self:
        """Builds the object from what `get_config` returned."""
        return cls(**config)


def shown(name: str, settings: Mapping[str, Any]) -> str:
    """A call as text, such as `"BlockSampler(rollout_length=8, stride=8)"`.

    Args:
        name: str, what is called.
        settings: dict from arguments to values; arrays appear as type and shape,
            what is long is cut.
    """
    arguments = (f"{key}={_value(value)}" for key, value in settings.items())
    return f"{name}({', '.join(arguments)})"


def _value(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if inspect.isroutine(value):
        return value.__qualname__
    if isinstance(value, keras.optimizers.Optimizer):
        return shown(type(value).__name__, value.get_config())
    if isinstance(value, Mapping) or type(value) in (list, tuple):
        return _container(value)
    text = " ".join(repr(value).split())
    if isinstance(value, (Shown, keras.Layer)) or len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[: MOST_CHARACTERS - 3]}..."


def _container(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{_listed([f'{k!r}: {_value(v)}' for k, v in value.items()])}}}"
    entries = _listed([_value(part) for part in value[: MOST_ENTRIES + 1]])
    if isinstance(value, list):
        return f"[{entries}]"
    return f"({entries},)" if len(value) == 1 else f"({entries})"


def _listed(entries: list[str]) -> str:
    return ", ".join(entries[:MOST_ENTRIES] + ["..."] * (len(entries) > MOST_ENTRIES))
