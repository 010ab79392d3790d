"""The soak of `benchmarks/soak.py`, small."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent


def soak(folder, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / "soak.py", "--backend"]
    command += [keras.backend.backend()]
    command += ["--steps", "12", "--steps-per-fit", "4", "--save-freq", "3"]
    command += ["--folder", folder, *arguments]
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.on_torch
@pytest.mark.skipif(sys.platform != "linux", reason="the soak reads /proc")
def test_a_run_that_was_killed_twice_is_the_same(tmp_path):
    """Once anywhere, once while it writes; fewer kills than asked for are a failure."""
    # What is not killed, in this process, which has imported what is slow.
    whole = tmp_path / "whole"
    whole.mkdir()
    runpy.run_path(str(ROOT / "benchmarks" / "soak.py"))["train"](whole, 12, 4, 3)
    done = soak(tmp_path, "--kills", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 steps, 2 kills, bit-identical" in done.stdout
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    killed = [
        line["killed_at"] for line in map(json.loads, lines) if "killed_at" in line
    ]
    assert len(killed) == 2 and all(0 < step < 12 for step in killed)
    # Both runs are there: nothing is trained again.
    done = soak(tmp_path, "--kills", "3")
    assert done.returncode == 1
    assert "before it was killed 3 times" in done.stdout
