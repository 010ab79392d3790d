"""What a wheel holds besides code, and that it works where it is installed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A model of KerasHub is a tiny one; texts are given. All else is README's.
STAND_INS = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras_hub
backbone = keras_hub.models.LlamaBackbone(
    vocabulary_size=31, num_layers=4, num_query_heads=2, num_key_value_heads=1,
    hidden_dim=8, intermediate_dim=8,
)
tiny = keras_hub.models.LlamaCausalLM(backbone)
tiny.generate = lambda text: text
keras_hub.models.CausalLM.from_preset = lambda name: tiny
import numpy as np
texts = more_texts = np.arange(40).reshape(2, 20) % 31
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel of this tree, built apart from it: building leaves files behind."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "keras_ebft",
        source / "keras_ebft",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def wheel(built):
    with zipfile.ZipFile(built) as file:
        yield file


@pytest.mark.backend_independent
def test_the_wheel_holds_every_module_and_its_papers(wheel):
    names = wheel.namelist()
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("keras_ebft/**/*.py")}
    assert modules <= set(names)
    assert "keras_ebft/py.typed" in names
    assert "keras_ebft/reports/report.html.jinja" in names
    for paper in ("LICENSE", "CHANGELOG.md"):
        assert any(name.endswith(f".dist-info/licenses/{paper}") for name in names)


def metadata_of(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.backend_independent
def test_the_metadata_are_complete(wheel):
    metadata = metadata_of(wheel)
    for field in ("Author", "Keywords", "Summary", "License-Expression"):
        assert metadata[field], field
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Project-URL"].startswith("Paper, https://arxiv.org/")
    readme = metadata.get_payload()
    assert readme.startswith("# keras_ebft")
    # Pages elsewhere have none of the files that README's links lead to.
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert "docs/evaluation.md" in readme
    extras = set(metadata.get_all("Provides-Extra"))
    wanted = "jax tensorflow torch data huggingface export plots report docs"
    assert set(wanted.split()) <= extras


@pytest.mark.backend_independent
def test_extras_that_are_named_exist(wheel):
    """In errors, docstrings and pages."""
    extras = set(metadata_of(wheel).get_all("Provides-Extra"))
    paths = [*ROOT.glob("keras_ebft/**/*.py"), *ROOT.glob("docs/**/*.md")]
    named = {
        extra
        for path in [*paths, ROOT / "README.md", ROOT / "examples" / "keras_io.py"]
        for found in re.findall(
            r"(?:keras_ebft|\"\.)\[([a-z,]+)\]", path.read_text("utf-8")
        )
        for extra in found.split(",")
    }
    assert named <= extras, named - extras
    # `Completions` puts the name of what it writes to into its error.
    assert extras - named <= {"test", "examples", "tensorflow", "wandb", "mlflow"}


@pytest.mark.slow
@pytest.mark.on_torch
def test_the_readme_s_snippet_runs_from_an_installed_wheel(built, tmp_path):
    options = ["--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site"]
    install = [sys.executable, "-m", "pip", "install", *options, built]
    subprocess.run(install, check=True)
    readme = (ROOT / "README.md").read_text("utf-8")
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    snippet = snippet.replace('= "jax"', '= "torch"')
    done = subprocess.run(
        [sys.executable, "-c", STAND_INS + snippet + "print(keras_ebft.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    where = done.stdout.splitlines()[-1]
    assert where == str(tmp_path / "site" / "keras_ebft" / "__init__.py")
    assert "feature_matching_loss" in done.stdout
