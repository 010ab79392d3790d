"""The shape of the code itself: layers, backend branches, public names, examples."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import keras_ebft

PACKAGE = Path(keras_ebft.__file__).parent
# From the ground upwards. What stands on one line stands side by side: none of it
# imports another.
LAYERS = (
    ("version", "typing", "validation", "configurable"),
    ("backend",),
    ("data",),
    ("layout", "models"),
    ("records",),
    ("functional",),
    ("kernels", "objectives"),
    ("networks",),
    ("samplers", "features", "rewards", "training", "export", "plots"),
    ("distribution",),
    ("step", "notices", "recipes", "estimates"),
    ("inspection",),
    ("model",),
    ("evaluation",),
    ("callbacks", "reports"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
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


def test_every_module_has_its_place():
    found = {name_of(path) for path in MODULES}
    assert found == set(LEVELS), found ^ set(LEVELS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    own = name_of(path)
    for name in imported(path):
        if not name.startswith("keras_ebft."):
            continue
        other = name.split(".")[1]
        if other != own:
            assert LEVELS[other] < LEVELS[own], f"{own} imports {other}"


def test_only_their_owners_touch_private_and_backend_modules():
    owners = {
        "keras_hub.src": {"networks"},
        "keras.src": {"backend", "training"},
        "jax": {"backend", "kernels"},
        "torch": {"backend", "kernels"},
        "triton": {"kernels"},
        "tensorflow": {"backend", "data"},
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
            assert path == PACKAGE / "backend" / "runtime.py"


FAMILIES = PACKAGE / "networks" / "families"


@pytest.mark.backend_independent
def test_only_the_records_of_families_know_classes_of_keras_hub():
    """Elsewhere a family is what its record says, whatever its class is called."""
    import keras_hub

    known = dir(keras_hub.models)
    families = {n.removesuffix("Backbone") for n in known if n.endswith("Backbone")}
    families = tuple(families - {""})
    names = {name for name in known if name.startswith(families)}
    for path in MODULES:
        if FAMILIES in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if is_comparison(node) else ""
            compared = {part.strip("'") for part in re.split(r"[^\w']", text)}
            assert not compared & names, (path, compared & names)
            # `models` makes models of these classes, and lists those that it mends.
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and name_of(path) != "models":
                assert node.value not in names, (path, node.value)


def is_comparison(node):
    """Whether a node compares, or asks for the class of something."""
    called = isinstance(node, ast.Call) and getattr(node.func, "id", None)
    return isinstance(node, ast.Compare) or called == "isinstance"


KERNEL_LANGUAGES = (
    "torch_triton",
    "torch_fused",
    "torch_in_place",
    "torch_onednn",
    "jax_pallas",
)


def is_kernel(path):
    """Whether a module is written in a kernel language, or for one backend."""
    return path.name.startswith(KERNEL_LANGUAGES)


def test_only_the_dispatcher_imports_kernels():
    """By name, when one first runs, so that their packages may be missing."""
    for path in MODULES:
        if not is_kernel(path):
            for name in imported(path):
                assert not any(part in name for part in KERNEL_LANGUAGES), path


# They subclass what an optional package has, or are of one backend.
IMPORTED_WHERE_USED = (
    "limited_templates.py",
    "jax_processes.py",
    "tensorflow_processes.py",
    "torch_processes.py",
)


def test_importing_the_library_imports_no_optional_package():
    """They are imported where they are used: `tfds` builders, the command line."""
    optional = {"tensorflow", "torch", "tensorflow_datasets", "datasets"}
    optional |= {"matplotlib", "sacrebleu", "tokenizers", "comet", "grain", "triton"}
    optional |= {"jinja2", "gguf", "rich", "tensorboardX", "wandb", "mlflow"}
    optional |= {"pydantic", "yaml", "pyarrow", "pandas"}
    for path in MODULES:
        if path.parent == PACKAGE / "data" / "builders" or is_kernel(path):
            continue
        if path.name in IMPORTED_WHERE_USED or name_of(path) == "cli":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [getattr(node, "module", None) or ""]
            found = {name.split(".")[0] for name in names} & optional
            assert not found, f"{path} imports {found}"


MOST_LINES = 50
# Constructors of configured objects take one argument per setting.
MOST_ARGUMENTS = 8


def functions(path):
    """Every function of a module, with the lines of its body."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body
            if ast.get_docstring(node) is not None:
                body = body[1:]
            yield node, body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_readable(path):
    if is_kernel(path):
        # Kernel languages inline what a kernel calls; a kernel is one function.
        return
    for node, lines in functions(path):
        assert lines <= MOST_LINES, f"{node.name}: {lines} lines"
        given = [*node.args.posonlyargs, *node.args.args]
        if node.name != "__init__":
            assert len(given) <= MOST_ARGUMENTS, f"{node.name}: {len(given)} arguments"


def test_public_names_exist_and_are_documented():
    for name in keras_ebft.__all__:
        assert getattr(keras_ebft, name).__doc__, name


@pytest.mark.parametrize(
    "name",
    [
        "layout.geometry",
        "functional.feature_matching",
        "samplers.block_sampler",
        "samplers.replay_sampler",
        "objectives.critic",
        "layout.documents",
        "features.feature_network",
        "functional.losses",
        "rewards.characteristic_function",
        "rewards.feature_matching",
        "rewards.reward_sum",
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
