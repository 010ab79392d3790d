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
    "masking": 0,
    "adapters": 1,
    "checkpoints": 1,
    "current_weights": 1,
    "geometry": 1,
    "documents": 1,
    "pooling": 1,
    "data": 2,
    "models": 3,
    "plots": 2,
    "inner_products": 1,
    "losses": 1,
    "critic": 1,
    "functional": 2,
    "blocks": 2,
    "kernels": 3,
    "kernel_log": 4,
    "bridge": 4,
    "callable_network": 4,
    "row_cache": 4,
    "sample_groups": 4,
    "prefix_cache": 5,
    "token_rows": 5,
    "block_sampler": 6,
    "features": 5,
    "export": 5,
    "rewards": 6,
    "metrics": 5,
    "objective": 5,
    "draws": 7,
    "verifier_reward": 7,
    "frozen_networks": 7,
    "inputs": 7,
    "step": 8,
    "inspection": 9,
    "serialization": 9,
    "trainer": 9,
    "model": 10,
    "callbacks": 11,
    "evaluation": 11,
    "__init__": 12,
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
        "triton": {"kernels"},
        "tensorflow": {"data", "kernels"},
        "tensorflow_datasets": {"data"},
        "sacrebleu": {"evaluation"},
        "matplotlib": {"plots"},
    }
    for path in MODULES:
        for name in imported(path):
            for prefix, allowed in owners.items():
                if name == prefix or name.startswith(prefix + "."):
                    assert name_of(path) in allowed, f"{path.name} imports {name}"
        if "backend.backend()" in path.read_text():
            assert path == PACKAGE / "kernels" / "backend.py"


KERNEL_LANGUAGES = ("torch_triton", "torch_fused", "jax_pallas")


def is_kernel(path):
    """Whether a module is written in a kernel language, or for one backend."""
    return path.name.startswith(KERNEL_LANGUAGES)


def test_only_the_dispatcher_imports_kernels():
    """By name, when one first runs, so that their packages may be missing."""
    for path in MODULES:
        if not is_kernel(path):
            for name in imported(path):
                assert not any(part in name for part in KERNEL_LANGUAGES), path


def test_importing_the_library_imports_no_optional_package():
    """They are imported where they are used; `tfds` builders are such places."""
    optional = {"tensorflow", "torch", "tensorflow_datasets", "datasets"}
    optional |= {"matplotlib", "sacrebleu", "tokenizers", "comet", "grain", "triton"}
    optional |= {"jinja2", "gguf"}
    for path in MODULES:
        if path.parent == PACKAGE / "data" / "builders" or is_kernel(path):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [getattr(node, "module", None) or ""]
            found = {name.split(".")[0] for name in names} & optional
            assert not found, f"{path} imports {found}"


def test_modules_stay_readable():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_public_names_exist_and_are_documented():
    for name in keras_ebft.__all__:
        assert getattr(keras_ebft, name).__doc__, name


@pytest.mark.parametrize(
    "name",
    [
        "geometry",
        "functional",
        "block_sampler",
        "critic",
        "documents",
        "features",
        "losses",
        "rewards",
        "verifier_reward",
        "data.bin_packing",
        "data.chat_templates",
        "data.packing",
        "data.records",
        "evaluation.code_checks",
        "evaluation.sandbox",
        "evaluation.text_metrics",
    ],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"keras_ebft.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
