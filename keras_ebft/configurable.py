"""Plain objects that carry their configuration, as Keras' own do."""

from typing import Any, TypeVar

Self = TypeVar("Self", bound="Configurable")


class Configurable:
    """An object that can be rebuilt from the arguments it was made with."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        raise TypeError(
            f"Expected {type(self).__name__} to define get_config(), returning its "
            "constructor's arguments as a dict."
        )

    @classmethod
    def from_config(cls: type[Self], config: dict[str, Any]) -> Self:
        """Builds the object from what `get_config` returned."""
        return cls(**config)
