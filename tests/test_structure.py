"""The shape of the code itself: layers, backend branches, public names, examples."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import keras_ebft

PACKAGE = Path(keras_ebft.__file__).parent
LEVELS = {
    "version": 0,
    "validation": 0,
    "configurable": 0,
    "geometry": 1,
    "adapters": 1,
    "checkpoints": 1,
    "inner_products": 1,
    "functional": 2,
    "kernels": 2,
    "bridge": 2,
    "row_cache": 2,
    "prefix_cache": 3,
    "token_rows": 3,
    "block_sampler": 4,
    "features": 4,
    "rewards": 4,
    "metrics": 4,
    "inputs": 4,
    "step": 5,
    "inspection": 6,
    "model": 7,
    "__init__": 8,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path):
    """Dotted names of everything a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    own = name_of(path)
    for name in imported(path):
        if name.startswith("keras_ebft."):
            other = name.split(".")[1]
            if other not in LEVELS or other == own:
                continue
            assert LEVELS[other] < LEVELS[own], f"{own} imports {other}"


def test_only_their_owners_touch_private_and_backend_modules():
    owners = {
        "keras_hub.src": {"bridge"},
        "keras.src": {"inputs"},
        "jax": {"kernels"},
        "torch": {"kernels"},
        "tensorflow": set(),
    }
    for path in MODULES:
        for name in imported(path):
            for prefix, allowed in owners.items():
                if name == prefix or name.startswith(prefix + "."):
                    assert name_of(path) in allowed, f"{path.name} imports {name}"
        if "backend.backend()" in path.read_text():
            assert path == PACKAGE / "kernels" / "backend.py"


def test_modules_stay_readable():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_public_names_exist_and_are_documented():
    for name in keras_ebft.__all__:
        assert getattr(keras_ebft, name).__doc__, name


@pytest.mark.parametrize(
    "name", ["geometry", "functional", "block_sampler", "features", "rewards"]
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"keras_ebft.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
