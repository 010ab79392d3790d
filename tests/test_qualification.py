"""Unproven kernels are tried before they run; the broken ones cost a log line.

Kernels for the CPU stand in for those of accelerators. Where only the process matters
that makes trials, a small script stands in for it.
"""

import dataclasses
import functools
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
from keras import ops
from test_dispatch import OPS, small_call

from keras_ebft import kernels
from keras_ebft.backend.device import Device
from keras_ebft.backend.measuring import exact_products, product_precision
from keras_ebft.kernels import __main__ as command
from keras_ebft.kernels import contracts, dispatch, qualification
from keras_ebft.kernels.feature_reward import specs as reward_specs
from keras_ebft.kernels.qualification import kept, process, trying

BACKEND = keras.backend.backend()
NAME = "stand_in"
# What runs the path where nothing unproven does.
PLAIN = "in_place" if BACKEND == "torch" else "chunked"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No verdicts, a cache folder of its own, and the registry as it was afterwards."""
    session = qualification._Session()
    monkeypatch.setattr(qualification, "_session", session)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_EBFT_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    yield session
    session.close()
    dispatch._select.cache_clear()
    dispatch._candidates.cache_clear()


def register(kernel, op="linear_logprob", plain=None):
    """An unproven implementation ahead of all others, whose record allows the CPU."""
    target = kernel if ":" in kernel else f"stand_in_kernels:{kernel}"
    records = [dispatch.Implementation(NAME, target, platforms=("cpu",), unproven=True)]
    if plain is not None:
        records.append(dispatch.Implementation("plain", f"stand_in_kernels:{plain}"))
    dispatch.register(op, (*records, *kernels.implementations(op)))


def logprob(rows=5):
    """Runs the path; returns the name of what was chosen."""
    with kernels.watch_choices() as choices:
        labels = ops.zeros((rows,), "int32")
        kernels.linear_logprob(ops.ones((rows, 8)), ops.ones((9, 8)), labels)
    (name,) = choices["linear_logprob"]
    return name


def captured(monkeypatch, call):
    """The trials that a call asks for, none of them made."""
    trials = []
    monkeypatch.setattr(
        qualification, "passes", lambda trial, words: trials.append(trial)
    )
    call()
    return trials


OUTCOMES = {
    "good": ("faster", ""),
    "slow": ("slower", ""),
    "wrong_output": ("wrong", "output 1"),
    "wrong_gradient": ("wrong", "gradient by head"),
    "wrong_where_large": ("wrong", "(call)"),
    "raising": ("failed", "no such instruction"),
    "out_of_memory": ("unchecked", "out of memory"),
}
if BACKEND != "tensorflow":
    # TensorFlow has no memory that nothing was written to.
    OUTCOMES["unwritten"] = ("wrong", "output 0")


@pytest.mark.parametrize("kernel", OUTCOMES)
def test_what_comes_of_a_kernel(kernel, monkeypatch):
    quick = functools.partial(trying.milliseconds, rounds=3, target=0.0)
    monkeypatch.setattr(trying, "milliseconds", quick)
    # Against another that is slow, the good one is sure to be faster.
    register(kernel, plain="plain" if kernel == "good" else None)
    rows = 401 if kernel == "wrong_where_large" else 5
    (trial,) = captured(monkeypatch, lambda: logprob(rows))
    outcome, says = OUTCOMES[kernel]
    verdict = trying.try_out(trial)
    assert verdict.outcome == outcome, verdict
    assert says in verdict.detail + verdict.what
    sentence = verdict.sentence(trial)
    assert f"runs {NAME if outcome == 'faster' else trial.plain_name}, " in sentence
    if outcome == "wrong":
        assert not verdict.error <= verdict.allowed
        assert f"{verdict.allowed:.1e} allowed" in sentence
    if outcome in ("faster", "slower"):
        assert verdict.error <= verdict.allowed == pytest.approx(1e-5, rel=0.5)
        assert set(verdict.times) == {"forward", "with backward"}
        for own, other in verdict.times.values():
            assert (own < other) == (outcome == "faster")
            assert f"{own:.3g} ms against {other:.3g} ms" in sentence
    # It goes from one process to another, and into a file.
    kept.write(trial, verdict)
    assert kept.read(trial) == verdict
    assert kept.entries() == [(trial, verdict)]


@pytest.mark.on_torch
@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((op, "float32") for op in OPS), ("linear_sample", "bfloat16")],
)
def test_every_path_can_be_tried(op, dtype, monkeypatch):
    """With every option, by what runs everywhere."""
    plain = [r for r in kernels.implementations(op) if r.backends == dispatch.BACKENDS]
    register(plain[0].target, op)
    spec = importlib.import_module(f"keras_ebft.kernels.{op}.specs").SPECS[-1]
    arrays = [ops.convert_to_tensor(a, dtype) for a in spec.arrays().values()]
    run = getattr(kernels, op)
    (trial,) = captured(monkeypatch, lambda: spec.bind(run)(*arrays))
    assert set(trial.options) == spec.in_use()
    checks, timing = trial.specs()
    for like in (*checks, timing):
        assert like.in_use() == spec.in_use()
        assert all(value for value in like.shapes().values())
    assert tuple(timing.shapes().values()) == trial.shapes
    monkeypatch.setattr(trying, "milliseconds", lambda calls: dict.fromkeys(calls, 1.0))
    verdict = trying.try_out(trial)
    assert verdict.outcome == "slower", verdict


SCRIPT = """
import json, os, sys, time
def say(number, found):
    answer = {"number": number, "found": found}
    print("@keras_ebft " + json.dumps(answer), flush=True)
say(0, {"device": "cpu", "platform": "cpu", "capability": None, "maker": None})
for line in sys.stdin:
    number = json.loads(line)["number"]
    print("chatter", flush=True)
    BODY
"""
ANSWER = 'say(number, {"outcome": "OUTCOME"})'


@pytest.fixture
def answers(monkeypatch):
    """Function that lets a script with this body make trials."""

    def use(body, script=SCRIPT):
        code = script.replace("BODY", body)
        monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", "-c", code))

    return use


def answer(outcome):
    return ANSWER.replace("OUTCOME", outcome)


def messages(caplog, level=logging.INFO):
    found = [
        r.message for r in caplog.records if r.levelno >= level and NAME in r.message
    ]
    caplog.clear()
    return [m for m in found if not m.startswith("Trying")]


def again(monkeypatch):
    """As another process would begin."""
    qualification._session.close()
    monkeypatch.setattr(qualification, "_session", qualification._Session())


@pytest.mark.backend_independent
def test_a_verdict_is_kept_per_class_of_shapes(answers, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "keras_ebft")
    register("good")
    answers(answer("faster"))
    assert logprob() == NAME
    (message,) = messages(caplog)
    assert "right and faster" in message
    assert logprob() == NAME
    assert messages(caplog) == []
    again(monkeypatch)
    answers("raise SystemExit")
    # Five rows and eight are one class, nine are another.
    assert logprob(5) == logprob(8) == NAME
    assert len(messages(caplog)) == 1
    assert logprob(9) != NAME
    assert len(kept.entries()) == 2


@pytest.mark.backend_independent
@pytest.mark.parametrize(("kernel", "is_tried"), [("raising", True), ("good", False)])
def test_what_broke_a_week_ago_is_tried_again(kernel, is_tried, monkeypatch):
    """The driver that was to blame may be another; what is right stays right."""
    register(kernel)
    (trial,) = captured(monkeypatch, logprob)
    outcome = "failed" if is_tried else "slower"
    kept.write(trial, qualification.Verdict(outcome))
    (path,) = kept.folder().glob("*.json")
    for days, is_kept in ((6, True), (8, not is_tried)):
        then = path.stat().st_mtime - days * 24 * 3600
        os.utime(path, (then, then))
        assert (kept.read(trial) is not None) == is_kept
        os.utime(path)


@pytest.mark.backend_independent
def test_other_versions_and_other_code_are_tried_again(answers, monkeypatch):
    register("good")
    answers(answer("faster"))
    assert logprob() == NAME
    again(monkeypatch)
    answers(answer("slower"))
    monkeypatch.setattr(qualification.trial, "__version__", "another")
    assert logprob() != NAME
    again(monkeypatch)

    monkeypatch.setattr(qualification.trial, "_code_digest", lambda target: "another")
    assert logprob() != NAME
    assert len(kept.entries()) == 3


BROKEN = {
    "hung": ("time.sleep(3600)", "no answer in"),
    "failed": (
        'print("illegal address\\nI0000 00:00:1.5 found no GPU", file=sys.stderr); '
        "os._exit(7)",
        "ended with 7",
    ),
}


@pytest.mark.backend_independent
@pytest.mark.parametrize("outcome", BROKEN)
def test_what_hangs_or_dies_costs_a_log_line(outcome, answers, monkeypatch, caplog):
    monkeypatch.setattr(qualification, "TRIAL_LIMIT", 30.0)
    if outcome == "hung":
        monkeypatch.setattr(qualification, "TRIAL_LIMIT", 0.2)
    body, says = BROKEN[outcome]
    register("good")
    answers(body)
    assert logprob() == PLAIN
    (message,) = messages(caplog, logging.WARNING)
    assert says in message and f"runs {PLAIN}" in message
    assert outcome == "hung" or "illegal address" in message
    assert qualification._session.process is None
    # The next one gets another process; what is known is not tried again.
    monkeypatch.setattr(qualification, "TRIAL_LIMIT", 30.0)
    answers(answer("faster"))
    assert logprob(9) == NAME
    again(monkeypatch)
    assert logprob() == PLAIN


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "before",
    [
        # What was asked before, and given up.
        'say(number - 1, {"outcome": "failed"})',
        'sys.stdout.buffer.write(b"\\xe9\\n"); sys.stdout.flush()',
        'print("@keras_ebft {", flush=True)',
    ],
)
def test_the_answer_is_found_among_others(before, answers):
    register("good")
    answers(f"{before}; {answer('faster')}")
    assert logprob() == NAME


@pytest.mark.backend_independent
def test_an_interrupted_trial_leaves_no_process(answers, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    register("good")
    answers(answer("failed"))
    with monkeypatch.context() as context:
        context.setattr(process.TrialProcess, "ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            logprob()
    assert qualification._session.process is None
    answers(answer("faster"))
    assert logprob() == NAME


@pytest.mark.backend_independent
def test_what_a_kernel_starts_ends_with_its_process(answers, monkeypatch):
    """A compiler that goes on would hold the pipe that answers come through."""
    register("good")
    start = 'import subprocess; subprocess.run(["sleep", "60"], close_fds=False)'
    answers(start)
    monkeypatch.setattr(qualification, "TRIAL_LIMIT", 2.0)
    begun = time.monotonic()
    assert logprob() == PLAIN
    # Not 60 s.
    assert time.monotonic() - begun < 40


@pytest.mark.backend_independent
@pytest.mark.parametrize("times", [1, 2])
def test_what_others_have_ended_is_tried_again(times, answers, tmp_path, monkeypatch):
    """Once: by the timer of a process without work, or where memory ran out."""
    register("good")
    ended = f'os.path.getsize("{tmp_path}/runs") <= {times} and os._exit(0)'
    answers(f'open("{tmp_path}/runs", "a").write("x"); {ended}; {answer("faster")}')
    assert logprob() == (NAME if times == 1 else PLAIN)
    assert len(kept.entries()) == 1
    again(monkeypatch)
    assert logprob() == NAME


@pytest.mark.backend_independent
def test_what_cannot_be_tried_is_tried_once_per_class(answers, monkeypatch):
    tried = []

    def unchecked(trial):
        tried.append(trial.shapes)
        return qualification.Verdict("unchecked", "no memory left")

    register("good")
    monkeypatch.setattr(qualification, "_try", unchecked)
    for rows in (5, 6, 7, 8, 6, 9):
        assert logprob(rows) == PLAIN
    # Five rows and eight are one class.
    assert len(tried) == 2


@pytest.mark.backend_independent
def test_every_dtype_of_what_is_tried_has_a_tolerance():
    records = [r for op in OPS for r in kernels.implementations(op) if r.unproven]
    assert len(records) > 5
    for record in records:
        assert set(record.dtypes or ()) <= set(contracts.TOLERANCES), record.name


@pytest.mark.on_torch
@pytest.mark.parametrize(("visible", "found"), [(None, "2"), ("5, 6,7", "7")])
def test_trials_run_on_the_current_device(visible, found, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process._environment("torch")["CUDA_VISIBLE_DEVICES"] == found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process._environment("torch").get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.on_torch
def test_pytorchs_other_words_for_precision_are_kept():
    import torch

    products = torch.backends.cuda.matmul
    try:
        products.fp32_precision = "tf32"
        assert product_precision() == "tf32"
        with exact_products():
            assert product_precision() == "highest"
        assert product_precision() == products.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.backend_independent
@pytest.mark.parametrize("script", ["raise SystemExit('no device')", "BODY", SCRIPT])
def test_a_device_that_is_not_to_be_had_is_asked_for_once(
    script, answers, monkeypatch, caplog
):
    """The process ends, does not find the device, or finds another one."""
    monkeypatch.setattr(process, "START_LIMIT", 30.0)
    body = ""
    if script == "BODY":
        monkeypatch.setattr(process, "START_LIMIT", 0.2)
        body = "import time; time.sleep(3600)"
    register("good")
    answers(body, script.replace('"device": "cpu"', '"device": "abacus"'))
    assert logprob() == PLAIN
    (message,) = messages(caplog, logging.WARNING)
    assert "python -m keras_ebft.kernels" in message
    monkeypatch.setattr(process, "COMMAND", ("/no/such/program",))
    assert logprob(9) == PLAIN
    # Nothing is known of the kernel: another process tries it.
    again(monkeypatch)
    monkeypatch.setattr(process, "START_LIMIT", 30.0)
    answers(answer("faster"))
    assert logprob() == NAME


@pytest.mark.backend_independent
def test_the_environment_turns_trials_off_and_forgets_and_shows(
    answers, monkeypatch, caplog
):
    register("good")
    answers(answer("slower"))
    monkeypatch.setenv("KERAS_EBFT_KERNELS", "off")
    assert logprob() == PLAIN
    monkeypatch.setenv("KERAS_EBFT_KERNELS", "linear_logprob=reference, off")
    assert logprob() == "reference"
    monkeypatch.setenv("KERAS_EBFT_KERNELS", f"linear_logprob={NAME}")
    assert logprob() == NAME
    assert kept.entries() == []
    monkeypatch.delenv("KERAS_EBFT_KERNELS")
    assert logprob() == PLAIN
    assert messages(caplog, logging.WARNING) == []
    again(monkeypatch)
    monkeypatch.setenv("KERAS_EBFT_KERNELS", "show")
    assert logprob() == PLAIN
    (message,) = messages(caplog, logging.WARNING)
    assert "not faster" in message
    again(monkeypatch)
    answers(answer("faster"))
    assert logprob() == PLAIN
    again(monkeypatch)
    monkeypatch.setenv("KERAS_EBFT_KERNELS", "clear")
    assert logprob() == NAME
    assert len(kept.entries()) == 1
    with pytest.raises(ValueError, match=r"KERAS_EBFT_KERNELS.*'off'.*Received"):
        monkeypatch.setenv("KERAS_EBFT_KERNELS", "of")
        logprob()


@pytest.mark.backend_independent
def test_damaged_files_and_full_disks_cost_nothing(answers, monkeypatch, caplog):
    register("good")
    answers(answer("faster"))
    assert logprob() == NAME
    (path,) = kept.folder().glob("*.json")
    path.write_text(path.read_text()[:100])
    again(monkeypatch)
    assert logprob() == NAME
    assert json.loads(path.read_text())["verdict"]["outcome"] == "faster"

    def full(*arguments):
        raise OSError("No space left on device")

    again(monkeypatch)
    kept.clear()
    monkeypatch.setattr(os, "replace", full)
    caplog.clear()
    assert logprob() == NAME
    assert "No space left" in caplog.text
    # Nothing half written stays.
    assert list(kept.folder().iterdir()) == []

    def unforeseen(trial):
        raise RuntimeError("unforeseen")

    again(monkeypatch)
    monkeypatch.setattr(kept, "read", unforeseen)
    caplog.clear()
    assert logprob() == PLAIN
    assert "could not be tried here (RuntimeError: unforeseen)" in caplog.text


@pytest.mark.on_torch
@pytest.mark.parametrize("op", OPS)
def test_on_a_cpu_nothing_is_tried(op, monkeypatch):
    monkeypatch.setattr(qualification, "passes", None)
    small_call(op)
    for backend in dispatch.BACKENDS:
        call = dispatch.Call(op, backend, Device("cpu"), frozenset(["float32"]), 64)
        assert dispatch._candidates(call) == ()


@pytest.mark.backend_independent
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("op", OPS)
def test_what_is_tried_on_accelerators(op, platform):
    """Each path's own kernel; on TensorFlow nothing, it runs what is plain."""
    for backend in dispatch.BACKENDS:
        call = dispatch.Call(
            op, backend, Device(platform, None), frozenset(["bfloat16"]), 64
        )
        able = {"jax": f"pallas_{'gpu' if platform == 'cuda' else 'tpu'}"}
        if platform == "cuda" and dispatch._is_installed("triton"):
            able["torch"] = "triton"
        if op in ("causal_attention", "projection"):
            able = {}
        if (op, platform) == ("causal_attention", "cuda"):
            able = {"jax": "cudnn"}
        expected = (able.get(backend),)
        names = tuple(record.name for record in dispatch._candidates(call))
        assert names == tuple(filter(None, expected))
        chosen = dispatch._select(call, None, None).name
        assert chosen in ("fused", "blockwise", "chunked", "matrices", "reference")


@pytest.mark.backend_independent
def test_the_command_shows_and_forgets(answers, capsys):
    register("good")
    answers(answer("slower"))
    logprob()
    command.main(["--kept"])
    says = f"linear_logprob runs {PLAIN}, not stand_in, on cpu"
    assert says in capsys.readouterr().out
    command.main(["--clear"])
    assert "1 verdicts" in capsys.readouterr().out
    assert kept.entries() == []


@pytest.mark.backend_independent
def test_the_command_says_what_runs_and_why(answers, capsys):
    found = {"outcome": "slower", "what": "output 0", "error": 3e-6, "allowed": 1e-5}
    found["times"] = {"forward": [2.0, 1.5]}
    answers(f"say(number, {found})")
    command.main([])
    out = capsys.readouterr().out
    for op in OPS:
        assert f"\n{op}\n" in out
    assert "pallas_gpu: needs " in out
    assert f"{PLAIN}: runs (float32, (124, 256))" in out
    assert "off by 3.0e-06 of 1.0e-05 allowed, forward 2 ms against 1.5 ms" in out
    assert "it is the definition" in out


@pytest.mark.backend_independent
def test_the_command_tries_what_could_not_be_tried(answers, monkeypatch, capsys):
    register("good")
    answers("", "raise SystemExit")
    logprob()
    ((wanted, _),) = kept.entries()
    gone = dataclasses.replace(wanted, target="no_such_module:kernel")
    monkeypatch.setattr(qualification.trial, "_code_digest", lambda target: target)
    for trial in (wanted, gone):
        kept.write(trial, qualification.Verdict("unchecked"))
    again(monkeypatch)
    answers(answer("slower"))
    command.main([])
    assert kept.read(wanted).outcome == "slower"
    assert kept.read(gone).outcome == "unchecked"
    assert wanted.device in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.on_torch
def test_a_real_process_tries_kernels_of_every_kind(monkeypatch):
    monkeypatch.setattr(process, "START_LIMIT", 600.0)
    monkeypatch.setattr(qualification, "TRIAL_LIMIT", 600.0)
    for kernel in ("good", "wrong_output", "crashing"):
        register(kernel, plain="plain")
        assert logprob() == (NAME if kernel == "good" else "plain")
        dispatch.register(
            "linear_logprob", kernels.implementations("linear_logprob")[2:]
        )
    outcomes = {trial.target: verdict for trial, verdict in kept.entries()}
    assert [
        outcomes[f"stand_in_kernels:{k}"].outcome for k in ("good", "wrong_output")
    ] == [
        "faster",
        "wrong",
    ]
    assert "ended with 7" in outcomes["stand_in_kernels:crashing"].detail


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.backend_independent
def test_the_check_of_a_gpu_has_its_parts(tmp_path):
    code = [sys.executable, BENCHMARKS / "gpu_check.py", "--dry-run"]

    def names(*options):
        said = subprocess.run(
            [*code, *options], capture_output=True, text=True, check=True
        ).stdout
        return said, re.findall(r"^(\w+) \(\w+, \d+ s\): ", said, re.M)

    _, found = names("--parts", "jax_trials", "torch_contracts")
    assert found == ["torch_contracts", "jax_trials"]
    said, found = names("--reference", tmp_path)
    assert len(found) == 16
    assert "reference_step_1b" in found
    for script in re.findall(r"\S+\.py", said):
        assert Path(script).exists(), script


@pytest.mark.on_torch
@pytest.mark.parametrize(("off", "allowed"), [(1e-6, True), (0.2, False)])
def test_a_reward_of_zero_may_be_rounding(off, allowed):
    """Rewards are of order one: relative to zero any rounding is infinite."""
    spec = reward_specs.Spec("call")
    shape = (spec.batch, spec.samples, spec.blocks)
    forms = {
        "forward": {
            "own": lambda: {"diversity": ops.full(shape, off)},
            "other": lambda: {"diversity": ops.zeros(shape)},
        }
    }
    (found,) = trying._large_deviations(forms, [], spec)
    assert found.is_allowed == allowed


@pytest.mark.on_torch
def test_the_check_of_a_gpu_measures_contracts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_check = importlib.import_module("gpu_check")
    for kernel in ("good", "wrong_output"):
        record = dispatch.Implementation(
            NAME, f"stand_in_kernels:{kernel}", platforms=("cpu",), unproven=True
        )
        worst = gpu_check.contract_of("linear_logprob", record, Device("cpu"))
        assert set(worst) == {
            f"{name}, {dtype}"
            for name in ("plain", "sampled", "one_row", "everything")
            for dtype in ("float32", "bfloat16")
        }
        exact = [off for name, off in worst.items() if "float32" in name]
        right = [off["error"] <= off["allowed"] for off in exact]
        assert all(right) if kernel == "good" else not any(right)
