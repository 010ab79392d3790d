"""The versions of Keras and KerasHub this library was tested with.

It reaches attention through parts of both that are not public, which other versions
may have changed without a word.
"""

import keras
import keras_hub

TESTED_VERSIONS = {"keras": ("3.15",), "keras-hub": ("0.32",)}


def check_versions():
    """Raises a `ValueError` unless Keras and KerasHub are versions that were tested."""
    installed = {"keras": keras.__version__, "keras-hub": keras_hub.__version__}
    for package, version in installed.items():
        tested = TESTED_VERSIONS[package]
        if ".".join(version.split(".")[:2]) not in tested:
            raise ValueError(
                f"Expected a version of {package} that keras_ebft was tested with, "
                f"because it routes attention through private parts of it: "
                f"{', '.join(tested)}. Received: {package} {version}. Install a "
                f'tested version: pip install "{package}=={tested[-1]}.*"'
            )
