"""Imports Triton from where the Makefile puts it, out of reach of other backends.

To be imported before anything else: once JAX or TensorFlow are loaded, which bring an
LLVM too, importing Triton aborts the process.
"""

import importlib
import os
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "triton"
if os.environ.get("KERAS_BACKEND") == "torch" and FOLDER.is_dir():
    sys.path.append(str(FOLDER))
    importlib.import_module("triton")
