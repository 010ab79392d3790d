"""Plain objects that carry their configuration, as Keras' own do."""


class Configurable:
    """An object that can be rebuilt from the arguments it was made with."""

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        raise TypeError(
            f"Expected {type(self).__name__} to define get_config(), returning its "
            "constructor's arguments as a dict."
        )

    @classmethod
    def from_config(cls, config):
        """Builds the object from what `get_config` returned."""
        return cls(**config)
