"""Every example, small: all of its lines run, and it ends with a table and a plot."""

from pathlib import Path

import pytest
from helpers import run_script

from keras_ebft.data.builders import catalogue_files

ROOT = Path(__file__).parent.parent
ONE = ("--batch-size", "2", "--steps", "1", "--length", "48")
SHORT = (*ONE, "--held-out-rows", "2", "--model", "micro", "--micro-steps", "1")
SMALL = ("--layers", "2", "--width", "16", "--pretrain-steps", "1")
PART = ("--split", "train[:2%]", "--held-out-split", "validation[:5%]")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and weights, shared by the examples."""
    return tmp_path_factory.mktemp("cache")


def run(name, folder, *arguments):
    """What the example prints."""
    script = ROOT / "examples" / f"{name}.py"
    printed = run_script(script, *arguments, "--output", str(folder))
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return printed


@pytest.mark.not_on_tensorflow
@pytest.mark.slow
@pytest.mark.compiled
def test_unstructured_code(tmp_path, cache):
    arguments = (*SHORT, *PART, "--cache", str(cache))
    printed = run("unstructured_code", tmp_path, *arguments, "--rollout-lengths", "2")
    assert "feature-matching loss" in printed
    assert "fill rate" in printed
    assert len(list(cache.glob("micro_*.weights.h5"))) == 1


@pytest.mark.slow
@pytest.mark.on_torch
def test_qa_code(tmp_path, cache):
    arguments = (*SHORT, "--cache", str(cache), "--split", "train[:2%]")
    arguments += ("--epochs", "1", "--problems", "2", "--samples", "2")
    printed = run("qa_code", tmp_path, *arguments, "--body-tokens", "4")
    assert "pass@1 " in printed
    assert "pass@2 " in printed


@pytest.mark.slow
@pytest.mark.on_torch
def test_translation(tmp_path, cache):
    installed = catalogue_files.installed_languages(catalogue_files.default_folders())
    if "de" not in installed:
        pytest.skip("no German message catalogues on this system")
    arguments = (*SHORT, *PART, "--cache", str(cache), "--sft-steps", "1")
    arguments += ("--epochs", "1", "--sentences", "2")
    printed = run("translation", tmp_path, *arguments)
    assert "BLEU" in printed
    assert "chrF" in printed
    assert printed.count("target:") == 2


@pytest.mark.slow
@pytest.mark.on_torch
def test_lora(tmp_path, cache):
    arguments = (*SHORT, "--cache", str(cache), "--epochs", "1")
    printed = run("lora", tmp_path, *arguments, "--folder", str(ROOT / "keras_ebft"))
    assert "parameters are trained" in printed
    assert (tmp_path / "adapters.lora.h5").exists()


@pytest.mark.slow
@pytest.mark.on_torch
def test_compare_methods(tmp_path):
    arguments = (*SMALL, *ONE, "--length", "64", "--numbers", "4", "--problems", "2")
    arguments += ("--body-tokens", "3", "--vocabulary", "300")
    printed = run("compare_methods", tmp_path, *arguments)
    table = printed[printed.index("held-out") :]
    for method in ("base", "SFT", "RLVR", "EBFT"):
        assert f"\n{method} " in table
