"""What a wheel holds besides code."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built apart from it: building leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
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
    with zipfile.ZipFile(path) as file:
        yield file


def test_the_wheel_holds_every_module_and_its_papers(wheel):
    names = wheel.namelist()
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("keras_ebft/**/*.py")}
    assert modules <= set(names)
    assert "keras_ebft/py.typed" in names
    assert "keras_ebft/reports/report.html.jinja" in names
    for paper in ("LICENSE", "CHANGELOG.md"):
        assert any(name.endswith(f".dist-info/licenses/{paper}") for name in names)


def test_the_metadata_are_complete(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    for field in ("Author", "Keywords", "Summary", "License-Expression"):
        assert metadata[field], field
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Project-URL"].startswith("Paper, https://arxiv.org/")
    assert metadata.get_payload().startswith("# keras_ebft")
