"""The demo, small: every line of it runs, and the second run uses the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "quickstart.py"),
        *("--pretrain-steps", "2", "--epochs", "1", "--steps-per-epoch", "1"),
        *("--batch-size", "2", "--validation-documents", "2"),
        *("--layers", "4", "--width", "48"),
        *("--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "plots")),
    ]
    output = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    assert "feature-matching loss" in output.stdout
    assert output.stdout.count("--- after") == 3
    assert (tmp_path / "plots" / "quickstart.png").stat().st_size > 10_000
    assert len(list((tmp_path / "cache").rglob("pretrained.weights.h5"))) == 1
