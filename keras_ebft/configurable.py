"""Plain objects that carry their configuration, as Keras' own do."""

import inspect
from typing import Any, TypeVar

from keras_ebft.representation import Shown

Self = TypeVar("Self", bound="Configurable")


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
