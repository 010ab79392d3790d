"""Runs from a file and a shell: `keras-ebft train run.yaml`.

To add a setting, do: nothing, if it is an argument of a class of this library or of
Keras, because sections take their keys from constructors; else a field in
`settings.py`, its use in `building.py`, and its line in `docs/command_line.md`.
"""

from keras_ebft.cli.main import main

__all__ = ["main"]
