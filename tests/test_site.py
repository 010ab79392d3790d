"""The site of the documentation: it builds, links lead on, no name is missing."""

import inspect
import os
import runpy
import subprocess
import sys
import types
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

import keras_ebft
import keras_ebft.kernels

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.backend_independent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built strictly: any warning is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def documented(site):
    """All names of the API reference, from the site's list of them."""
    entries = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(entries).decode().splitlines()}


def public_names():
    """Dotted names of what the package and its public modules export."""
    modules = [keras_ebft, keras_ebft.kernels]
    exported = {name: getattr(keras_ebft, name) for name in keras_ebft.__all__}
    modules += [m for m in exported.values() if isinstance(m, types.ModuleType)]
    for module in modules:
        names = getattr(module, "__all__", None) or defined_in(module)
        for name in names:
            value = getattr(module, name)
            if name.startswith("__") or isinstance(value, types.ModuleType):
                continue
            yield f"{module.__name__}.{name}", value


def defined_in(module):
    """What a module without `__all__` defines: functions and classes."""
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
    ]


def members(name, value):
    """Dotted names of the documented methods and properties of a class of ours."""
    for base in inspect.getmro(value):
        if base.__module__.split(".")[0] == "keras_ebft":
            for member, found in vars(base).items():
                is_alias = getattr(found, "__name__", member) != member
                if (
                    not member.startswith("_")
                    and inspect.getdoc(found)
                    and not is_alias
                ):
                    yield f"{name}.{member}"


def test_every_public_name_is_in_the_reference(documented):
    names = dict(public_names())
    assert len(names) > 80
    assert set(names) <= documented, set(names) - documented


def test_so_are_the_methods_that_users_call(documented):
    for name in ("EBFTModel", "BlockSampler", "data.PackedStream"):
        value = dict(public_names())[f"keras_ebft.{name}"]
        found = set(members(f"keras_ebft.{name}", value))
        assert found <= documented, found - documented
    assert {"keras_ebft.EBFTModel.fit", "keras_ebft.EBFTModel.rollout"} <= documented


def test_pages_from_elsewhere_are_in_the_site(site):
    for page in ("index.html", "changelog", "results/adapter_memory", "tutorial"):
        assert (site / page).exists(), page
    home = (site / "index.html").read_text("utf-8")
    assert 'href="evidence/"' in home and "docs/evidence.md" not in home


def test_pictures_are_those_of_their_script():
    script = runpy.run_path(str(ROOT / "docs" / "draw_concepts.py"))
    kept = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    assert kept == set(script["PICTURES"])
    for name, draw in script["PICTURES"].items():
        assert (ROOT / "docs" / "pictures" / name).read_text("utf-8") == draw(), name
        ElementTree.fromstring(draw())
