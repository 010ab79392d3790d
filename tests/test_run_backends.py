"""Sums of several runs of pytest, and what counts as a failure."""

import os

import pytest
import run_backends

pytestmark = pytest.mark.backend_independent

PRINTED = """\
.......s..F                                                              [100%]
FAILED tests/test_a.py::test_b - assert 1 == 2
=========== 1 failed, 8 passed, 2 skipped, 7 deselected in 12.3s ===========
"""
GOOD = "== 3 passed, 1 warning in 2.00s (0:00:02) ==\n"


def result(code, printed, seconds=1.0):
    counts, failures = run_backends.read_summary(printed)
    return run_backends.Result("jax", code, counts, failures, seconds)


def test_summaries_are_read():
    counts, failures = run_backends.read_summary(PRINTED)
    assert counts == {"failed": 1, "passed": 8, "skipped": 2, "deselected": 7}
    assert failures == ["FAILED tests/test_a.py::test_b - assert 1 == 2"]
    assert run_backends.read_summary("Killed\n") == ({}, [])


def test_parts_are_added_up():
    good, bad = result(0, GOOD, 2.0), result(1, PRINTED, 10.0)
    lines, well = run_backends.summary("jax", [good, bad])
    assert lines == [
        "jax: 7 deselected, 1 failed, 11 passed, 2 skipped, 1 warning (12 s)",
        "FAILED tests/test_a.py::test_b - assert 1 == 2",
    ]
    assert not well
    assert run_backends.summary("jax", [good, good])[1]


def test_a_part_without_tests_is_none_and_a_run_without_tests_a_failure():
    none = result(5, "== 9 deselected in 0.10s ==\n")
    assert run_backends.summary("jax", [none, result(0, GOOD)])[1]
    assert not run_backends.summary("jax", [none, none])[1]


def test_a_process_that_died_is_a_failure_in_words():
    lines, well = run_backends.summary("jax", [result(0, GOOD), result(-9, "")])
    assert not well
    assert "[-9]" in lines[-1]


@pytest.mark.parametrize("slow", [False, True])
def test_every_file_is_run_once_on_every_backend(slow):
    planned = list(run_backends.runs(["jax", "torch"], slow))
    plain = [run for run in planned if not run.optimized]
    for backend in ("jax", "torch"):
        files = [f for run in plain if run.backend == backend for f in run.files]
        assert len(files) == len(set(files)) > 80
    assert [run.name for run in planned if run.optimized] == ["jax, optimized"]


@pytest.mark.parametrize("slow", [False, True])
def test_tests_of_numbers_run_optimized_or_where_nothing_compiles(slow, monkeypatch):
    monkeypatch.delenv("UNOPTIMIZED_GRAPHS", raising=False)
    planned = list(run_backends.runs(["jax", "tensorflow", "torch"], slow))
    for run in planned:
        chosen = run.markers.split(" and ")
        assert ("not slow" in chosen) is not slow
        assert ("numbers" in chosen) is run.optimized
        left_out = run.backend != "torch" and not run.optimized
        assert ("not numbers" in chosen) is left_out
        unoptimized = run_backends.environment(run.backend, run.optimized)
        assert ("UNOPTIMIZED_GRAPHS" in unoptimized) is not run.optimized
    optimized = {run.backend for run in planned if run.optimized}
    assert optimized == {"jax", "tensorflow"}
    for run in planned:
        if run.optimized:
            assert len(run.files) == len(set(run.files)) > 80


def test_old_programs_are_removed_and_new_ones_kept(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for path in (new, old):
        path.write_text("a program")
    os.utime(old, (0, 0))
    run_backends.remove_old(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
