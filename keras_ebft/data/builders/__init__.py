"""This library's own `tfds` builders; importing one registers it with `tfds`."""

import importlib

CLASSES = {
    "python_source": "PythonSource",
    "python_docstrings": "PythonDocstrings",
    "message_catalogues": "MessageCatalogues",
}


def builder_class(name):
    """The builder class of that name, `None` if it is none of ours.

    Raises:
        ImportError: if `tfds` is not installed.
    """
    if name not in CLASSES:
        return None
    module = importlib.import_module(f"keras_ebft.data.builders.{name}")
    return getattr(module, CLASSES[name])


def language_pair(name):
    """The configuration of `message_catalogues` for a pair such as `"de-fr"`."""
    module = importlib.import_module("keras_ebft.data.builders.message_catalogues")
    return module.LanguagePair.from_name(name)
