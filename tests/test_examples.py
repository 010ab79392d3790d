"""Every example, small: all of its lines run, and it ends with a table and a plot."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest
from helpers import run_script

from keras_ebft.data.builders import catalogue_files
from keras_ebft.evaluation import check_completions

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


@pytest.mark.slow
@pytest.mark.on_torch
def test_unstructured_code(tmp_path, cache):
    arguments = (*SHORT, *PART, "--cache", str(cache))
    printed = run("unstructured_code", tmp_path, *arguments, "--rollout-lengths", "2")
    assert "feature-matching loss" in printed
    assert "fill rate" in printed
    assert len(list(cache.glob("micro_*.weights.h5"))) == 1


@pytest.mark.slow
@pytest.mark.on_torch
def test_qa_code(tmp_path, cache):
    arguments = (*SHORT, "--cache", str(cache), "--problems", "1", "--samples", "2")
    printed = run("qa_code", tmp_path, *arguments, "--body-tokens", "4")
    for name in ("pass@1", "pass@2"):
        assert f"{name} held-out functions" in printed
        assert f"{name} HumanEval" in printed


@pytest.mark.slow
@pytest.mark.on_torch
def test_qa_code_of_a_data_set(tmp_path, cache):
    arguments = (*SHORT, "--cache", str(cache), "--split", "train[:2%]")
    arguments += ("--dataset", "python_docstrings", "--problems", "0")
    printed = run("qa_code", tmp_path, *arguments)
    assert "cross-entropy" in printed
    assert "pass@" not in printed


@pytest.mark.slow
@pytest.mark.on_torch
def test_translation(tmp_path, cache):
    installed = catalogue_files.installed_languages(catalogue_files.default_folders())
    if "de" not in installed:
        pytest.skip("no German message catalogues on this system")
    arguments = (*SHORT, *PART, "--cache", str(cache), "--sft-steps", "1")
    printed = run("translation", tmp_path, *arguments, "--sentences", "2")
    assert "BLEU of 2 sentences: bare model" in printed
    assert "chrF" in printed
    assert printed.count("target:") == 2


@pytest.mark.slow
@pytest.mark.on_torch
def test_lora(tmp_path, cache):
    arguments = (*SHORT, "--cache", str(cache), "--folder", str(ROOT / "keras_ebft"))
    printed = run("lora", tmp_path, *arguments)
    assert "parameters are trained" in printed
    assert (tmp_path / "adapters.lora.h5").exists()


def imported(name, monkeypatch):
    """A module beside the examples."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


@pytest.mark.backend_independent
def test_functions_pass_their_own_tests_and_nothing_else_does(monkeypatch):
    functions = imported("checked_functions", monkeypatch)
    try:
        found = functions.load()
    except SystemExit as error:
        pytest.skip(str(error))
    assert len(found) == len({question for question, _, _ in found}) > 150
    assert len(found) == len({answer for _, answer, _ in found})
    assert functions.load()[:3] == found[:3]
    shortest = sorted(found, key=lambda f: len(f[1]))[:3]
    problems = [problem for _, _, problem in shortest]
    for question, answer, problem in shortest:
        assert problem.prompt == question
        ast.parse(question + answer)
    completions = [
        [answer, "    pass\n", "    return __name__\n"] for _, answer, _ in shortest
    ]
    results = check_completions(problems, completions)
    assert [[r.passed for r in of_one] for of_one in results] == [
        [True, False, False]
    ] * 3


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "program",
    [
        "import numpy\ndef main_solution(x):\n    return x",
        "def main_solution(x):\n    import os\n    return x",
        "y = 1\ndef main_solution(x):\n    return y",
        "def other(x):\n    return x",
        "def main_solution(x):\n    'Only words.'",
        "def main_solution(x:",
    ],
)
def test_functions_that_are_not_taken(program, monkeypatch):
    functions = imported("checked_functions", monkeypatch)
    record = {
        "task_description": "Do it.",
        "input_output_spec": "Input: x. Output: `return` (int): x.",
        "input_generator": "def generate_inputs(rng):\n    return {'x': 1}",
    }
    assert functions.read_function({**record, "code_sample": program}) is None
    taken = "import math\ndef main_solution(x):\n    return x"
    question, answer, _ = functions.read_function({**record, "code_sample": taken})
    assert question == (
        "import math\n\n\ndef main_solution(x):\n"
        '    """Do it.\n\n    Returns (int): x.\n    """\n'
    )
    assert answer == "    return x\n"


@pytest.mark.backend_independent
def test_the_table_of_changes(monkeypatch, capsys):
    """Documents without a value count on neither side; a star is beyond noise."""
    changes = imported("changes", monkeypatch)
    before = {"loss": np.array([1.0, np.nan, 2.0, 3.0]), "rate": np.array([0.0, 1.0])}
    after = {"loss": np.array([0.5, 9.0, 1.5, 2.5]), "rate": np.array([1.0, 0.5])}
    changes.report(before, {"EBFT": after}, {"loss": "the loss", "rate": "the rate"})
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        "the loss 3 2.0000 1.5000 (-0.5000 ±0.0000) *",
        "the rate 2 0.5000 0.7500 (+0.2500 ±1.4700)",
    ]


@pytest.mark.slow
@pytest.mark.on_torch
def test_compare_methods(tmp_path):
    arguments = (*SMALL, *ONE, "--length", "64", "--numbers", "4", "--problems", "2")
    arguments += ("--body-tokens", "3", "--vocabulary", "300")
    printed = run("compare_methods", tmp_path, *arguments)
    table = printed[printed.index("held-out") :]
    for method in ("base", "SFT", "RLVR", "EBFT"):
        assert f"\n{method} " in table
