"""The study: what is chosen and on what, and that a killed one goes on as it was."""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keras_ebft.evaluation import pass_at_k

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import study
import study_measures
import study_plan
import study_runs
import study_tables
import study_tasks

BENCHMARKS = Path(study.__file__).parent
SIZES = {"base": 8, "train": 6, "validation": 3, "test": 3}
NUMBERS = {
    "kind": "numbers",
    "families": ["remainder", "multiply"],
    "answer_tokens": 3,
    "sizes": SIZES,
}
PLAN = {
    "model": {"kind": "tiny", "width": 16},
    "adapters": 2,
    "length": 32,
    "batch_size": 1,
    "steps": 3,
    "seeds": [0, 1],
    "tasks": {"numbers": NUMBERS},
    "base": {"learning_rate": 0.03, "steps_each": 4, "most_steps": 4, "batch_size": 1},
    "audit": {"rows": 2, "batch_size": 2},
    "evaluation": {
        "samples": 2,
        "k": [1, 2],
        "batch_size": 6,
        "rollout_lengths": [2],
        "feature_rows": 1,
        "feature_samples": 2,
        "sampler": {"context_length": 2, "stride": 1},
        "distance_documents": 2,
    },
    "methods": {
        "SFT": {"kind": "sft", "learning_rates": [1e-3, 1e-2]},
        "EBFT": {
            "kind": "ebft",
            "learning_rates": [1e-2],
            "audit": True,
            "recipe": "translation",
            "sampler": {"num_samples": 2, "rollout_length": 2, "stride": 1},
        },
    },
}


def plan_of(**changes):
    return study_plan.complete({**PLAN, **changes})


class Written(study_plan.Records):
    """Records in memory, of lines written by hand."""

    def __init__(self, lines):
        self.lines = lines


def measured(greedy, cross_entropy):
    return {
        "greedy": greedy,
        "cross_entropy": cross_entropy,
        "per_document": {"greedy": [greedy] * 2, "cross_entropy": [cross_entropy] * 2},
        "sampled": greedy,
        "entropy": 1.0,
        "kl_from_base": 0.1,
    }


def run_of(rate, validation, test, seed=0):
    """Lines of a run and of its measurement on test documents, which may disagree."""
    settings = ("numbers", "SFT", "documents", rate, seed)
    run = {"validation": measured(*validation), "steps": 3, "cpu_seconds": 1.0}
    return {
        ("run", *settings): {**run, "passes_per_step": 96.0},
        ("test", *settings): {"measured": measured(*test)},
    }


START = {
    ("base", "numbers", 0): {"cross_entropy": 1.0, "greedy": 0.5},
    ("start", "numbers", "validation"): {"measured": measured(0.5, 1.0)},
    ("start", "numbers", "test"): {"measured": measured(0.5, 1.0)},
}


@pytest.mark.backend_independent
def test_the_rate_is_chosen_on_validation_documents_alone():
    plan = plan_of()
    # On test documents the other one is better, and by far.
    lines = run_of(1e-3, (0.6, 0.9), (0.1, 3.0)) | run_of(1e-2, (0.5, 0.8), (0.9, 0.1))
    chosen = study_plan.choose_rate(plan, Written(lines), "numbers", "SFT")
    assert chosen == 1e-3
    rate, found = study_tables.chosen_lines(
        plan, Written(lines), "numbers", "SFT", "documents"
    )
    assert rate == 1e-3
    assert [test["greedy"] for _, test in found] == [0.1]


@pytest.mark.backend_independent
def test_of_equal_scores_the_likelier_is_chosen():
    lines = run_of(1e-3, (0.5, 0.9), (0, 0)) | run_of(1e-2, (0.5, 0.8), (0, 0))
    assert study_plan.choose_rate(plan_of(), Written(lines), "numbers", "SFT") == 1e-2


@pytest.mark.backend_independent
def test_screening_seeds_alone_choose_and_all_of_them():
    lines = run_of(1e-3, (0.5, 0.9), (0, 0)) | run_of(1e-2, (0.4, 0.9), (0, 0))
    # A seed that only the chosen rate has.
    more = run_of(1e-3, (0.1, 2.0), (0, 0), seed=1)
    assert (
        study_plan.choose_rate(plan_of(), Written(lines | more), "numbers", "SFT")
        == 1e-3
    )
    both = plan_of(screening_seeds=2)
    assert study_plan.choose_rate(both, Written(lines), "numbers", "SFT") is None
    more |= run_of(1e-2, (0.4, 0.9), (0, 0), seed=1)
    assert study_plan.choose_rate(both, Written(lines | more), "numbers", "SFT") == 1e-2


@pytest.mark.backend_independent
def test_nothing_is_measured_on_test_documents_before_the_rate_is_chosen():
    plan, lines = plan_of(methods={"SFT": PLAN["methods"]["SFT"]}), dict(START)
    order = []
    while (unit := study_plan.next_unit(plan, Written(lines))) is not None:
        order.append(unit)
        kind, rate = unit[0], unit[4] if len(unit) > 4 else None
        lines[unit] = {
            "run": {"validation": measured(0.5 + (rate or 0), 1.0)},
            "test": {"measured": measured(0.5, 1.0)},
            "admission": {},
        }[kind]
    run = [("run", "numbers", "SFT", "documents", rate, 0) for rate in (1e-3, 1e-2)]
    best = ("numbers", "SFT", "documents", 1e-2)
    assert order == [
        *run,
        ("admission", "numbers"),
        ("test", *best, 0),
        ("run", *best, 1),
        ("test", *best, 1),
    ]


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("start", "after", "words"),
    [
        (0.5, (0.51, 0.4), []),
        (0.5, (0.4, 0.53), ["continued training gains 0.030"]),
        (0.8, (0.7, 0.7), ["it scores 0.800"]),
    ],
)
def test_admission(start, after, words):
    lines = {("start", "numbers", "validation"): {"measured": measured(start, 1.0)}}
    for rate, value in zip((1e-3, 1e-2), after):
        lines |= run_of(rate, (value, 1.0), (0.9, 0.1))
    found = study_plan.admission(plan_of(), Written(lines), "numbers")
    assert found["admitted"] == (not words)
    assert len(found["reasons"]) == len(words)
    assert all(word in reason for word, reason in zip(words, found["reasons"]))


@pytest.mark.backend_independent
def test_the_base_is_trained_until_its_validation_loss_stalls_twice():
    plan = plan_of(base={"steps_each": 10, "most_steps": 1000})

    def trained(*losses):
        lines = {
            ("base", "numbers", i): {"cross_entropy": loss}
            for i, loss in enumerate(losses)
        }
        return study_plan.base_is_trained(plan, Written(lines), "numbers")

    assert not trained(3.0, 2.0, 2.0, 1.5)
    assert trained(3.0, 2.0, 2.0, 1.5, 1.499)
    assert trained(*[3.0 - i / 50 for i in range(100)])  # most_steps


@pytest.mark.backend_independent
def test_a_line_that_was_cut_off_is_done_again(tmp_path):
    path = tmp_path / "study.jsonl"
    records = study_plan.Records(path)
    records.add(("base", "numbers", 0), {"cross_entropy": 1.0})
    whole = path.read_text("utf-8")
    path.write_text(whole + '{"unit": ["base", "num', "utf-8")
    again = study_plan.Records(path)
    assert list(again.lines) == [("base", "numbers", 0)]
    assert path.read_text("utf-8") == whole


@pytest.mark.backend_independent
def test_equal_compute_is_counted_from_passes():
    plan = plan_of(equal_compute={"methods": ["SFT"], "reference": "EBFT"})
    lines = run_of(1e-3, (0.5, 1.0), (0, 0))
    lines["run", "numbers", "EBFT", "documents", 1e-2, 0] = {"passes_per_step": 432.0}
    steps = study_plan.equal_compute_steps(plan, Written(lines), "numbers", "SFT")
    assert steps == round(3 * 432 / 96)


@pytest.mark.backend_independent
def test_expected_best_is_pass_at_k():
    for correct in range(5):
        scores = [1.0] * correct + [0.0] * (4 - correct)
        for k in range(1, 5):
            expected = pass_at_k(num_samples=4, num_correct=correct, k=k)
            assert study_measures.expected_best(scores, k) == pytest.approx(expected)
    # (0.2, 0.5), (0.2, 0.8), (0.5, 0.8)
    assert study_measures.expected_best([0.5, 0.2, 0.8], 2) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="from 1 to 2"):
        study_measures.expected_best([0.0, 1.0], 3)


@pytest.mark.backend_independent
def test_parts_of_a_task_share_no_prompt_and_their_answers_pass():
    families = list(study_tasks.FAMILIES)
    sizes = dict.fromkeys(study_tasks.PARTS, 40)
    task = study_tasks.make_task(
        {"kind": "numbers", "families": families, "sizes": sizes}
    )
    pairs = [pair for part in study_tasks.PARTS for pair in task.parts[part]]
    assert len({prompt for prompt, _ in pairs}) == len(pairs) == 160
    assert all(task.verify(prompt, f" {answer}\n") == 1.0 for prompt, answer in pairs)
    assert not any(task.verify(prompt, answer + "0") for prompt, answer in pairs)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "Received: \\['step'\\]"),
        ({"methods": {"SFT": {"kind": "sft"}}}, "`learning_rates` of method 'SFT'"),
        (
            {"methods": {"X": {"kind": "x", "learning_rates": [1]}}},
            "of kind sft, rlvr or ebft",
        ),
        ({"screening_seeds": 3}, "from 1 to 2"),
        ({"equal_compute": {"methods": ["PPO"]}}, "\\['PPO'\\]"),
        ({"equal_compute": {"methods": ["SFT"]}}, "Received: None for 'numbers'"),
    ],
)
def test_plans_that_cannot_be_done(change, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**change)


@pytest.mark.backend_independent
def test_the_plans_that_come_along_are_whole():
    for path in sorted((BENCHMARKS / "plans").glob("*.json")):
        plan = study_plan.read_plan(path)
        assert study_plan.first_sft(plan), path
        assert plan["about"], path


@pytest.mark.on_torch
def test_every_method_of_the_plans_can_be_built(tmp_path):
    methods = {}
    for name in ("cpu_small", "full"):
        plan = study_plan.read_plan(BENCHMARKS / "plans" / f"{name}.json")
        methods |= plan["methods"]
    plan = plan_of(methods=methods, model={"kind": "tiny", "width": 8, "layers": 4})
    found = {"features": {"layers": [0.5]}, "reward": {"whitening": "rollout"}}
    records = Written({("audit", "numbers"): found})
    workshop = study_runs.Workshop(plan, "numbers", tmp_path, records)
    workshop.pretrained = study_runs.load(plan["model"], 32, workshop.task)
    for name, method in methods.items():
        model = workshop.build(method, seed=0)
        trains_alone = study_measures.token_passes(model, 32, 1) == 96.0
        assert trains_alone == (method["kind"] == "sft"), name
        if method.get("audit"):
            assert model.feature_network.layers == (0.5,)


@pytest.mark.backend_independent
def test_a_folder_holds_one_plan(tmp_path):
    study.keep_plan(plan_of(), tmp_path)
    study.keep_plan(plan_of(), tmp_path)
    with pytest.raises(ValueError, match="Received: another"):
        study.keep_plan(plan_of(steps=4), tmp_path)


@pytest.fixture
def claims_of(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(study_plan.Claims(tmp_path / "claims"))


@pytest.mark.backend_independent
def test_processes_share_a_study(tmp_path, claims_of):
    plan = plan_of(equal_compute={"methods": ["SFT"], "reference": "EBFT"})
    path = tmp_path / "study.jsonl"
    ours, theirs = study_plan.Records(path), study_plan.Records(path)
    own, other, third, fourth, fifth, sixth = (claims_of() for _ in range(6))

    def run(method, rate, budget="documents"):
        return ("run", "numbers", method, budget, rate, 0)

    def done(unit, records):
        records.add(unit, {"validation": measured(0.5, 1.0), "passes_per_step": 9.0})

    first = ("base", "numbers", 0)
    assert study_plan.claim_unit(plan, ours, own) == first
    # What follows depends on it, so that there is nothing for another to do.
    assert study_plan.claim_unit(plan, theirs, other) is None
    ours.add(first, {"cross_entropy": 1.0})
    own.release()
    for unit in [*list(START)[1:], ("audit", "numbers")]:
        assert study_plan.claim_unit(plan, theirs, other) == unit
        theirs.add(unit, {"measured": measured(0.5, 1.0)})
        other.release()
    assert study_plan.claim_unit(plan, ours, own) == run("SFT", 1e-3)
    assert study_plan.claim_unit(plan, theirs, other) == run("SFT", 1e-2)
    assert study_plan.claim_unit(plan, theirs, third) == run("EBFT", 1e-2)
    # A process that ended without a result, killed for example.
    other.release()
    assert study_plan.claim_unit(plan, theirs, other) == run("SFT", 1e-2)
    done(run("EBFT", 1e-2), theirs)
    third.release()
    # Admission, and with it all that comes after, waits for supervised training.
    assert study_plan.claim_unit(plan, ours, third) is None
    for rate, claims in ((1e-3, own), (1e-2, other)):
        done(run("SFT", rate), ours)
        claims.release()
    assert study_plan.claim_unit(plan, theirs, own) == ("admission", "numbers")
    tested = ("test", "numbers", "SFT", "documents", 1e-3, 0)
    assert study_plan.claim_unit(plan, ours, other) == tested
    tested = ("test", "numbers", "EBFT", "documents", 1e-2, 0)
    assert study_plan.claim_unit(plan, ours, third) == tested
    # Of seed 1 the runs, and their measurements when they are done.
    later = ("run", "numbers", "SFT", "documents", 1e-3, 1)
    assert study_plan.claim_unit(plan, ours, fourth) == later
    later = ("run", "numbers", "EBFT", "documents", 1e-2, 1)
    assert study_plan.claim_unit(plan, ours, fifth) == later
    done(later, ours)
    fifth.release()
    assert study_plan.claim_unit(plan, ours, fifth) == ("test", *later[1:])
    # Equal compute is next, whose length has been measured by now.
    compute = run("SFT", 1e-3, "compute")
    assert study_plan.claim_unit(plan, theirs, sixth) == compute


@pytest.mark.backend_independent
def test_equal_compute_waits_for_the_reference():
    plan = plan_of(equal_compute={"methods": ["SFT"], "reference": "EBFT"})
    unit = ("run", "numbers", "SFT", "compute", 1e-3, 0)
    lines = run_of(1e-3, (0.5, 1.0), (0, 0))
    assert not study_plan.is_ready(plan, Written(lines), unit)
    lines["run", "numbers", "EBFT", "documents", 1e-2, 0] = {"passes_per_step": 9.0}
    assert study_plan.is_ready(plan, Written(lines), unit)


@pytest.mark.backend_independent
def test_a_process_waits_until_another_has_written_its_line(tmp_path):
    path = tmp_path / "study.jsonl"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import study_plan; "
        "from pathlib import Path; records = study_plan.Records(Path(sys.argv[2])); "
        "print('ready', flush=True); input(); records.add(('b', 1), {})"
    )
    command = [sys.executable, "-c", program, str(BENCHMARKS), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        # Not before: it would wait with that, too.
        assert other.stdout.readline() == "ready\n"
        with study_plan._alone(path), path.open("a", encoding="utf-8") as file:
            file.write('{"unit": ["a", 1]')
            file.flush()
            other.stdin.write("go\n")
            other.stdin.flush()
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1.0)
            file.write("}\n")
        assert other.wait(60) == 0
    assert list(study_plan.Records(path).lines) == [("a", 1), ("b", 1)]


class Snapshot(study_plan.Records):
    """Keeps what lies in the folder after some units, as a kill would leave it."""

    def add(self, unit, found):
        super().add(unit, found)
        if unit[0] == "run" and unit[4] == 1e-2 and unit[2] == "SFT":
            kept = self.path.parent.parent / "killed"
            if not kept.exists():
                shutil.copytree(self.path.parent, kept)


def without_seconds(path):
    text = re.sub(r'"\w*seconds": [\d.]+', "", path.read_text("utf-8"))
    return [json.loads(re.sub(r",\s*(?=[,}])", "", line)) for line in text.splitlines()]


def tables_of(plan, folder):
    records = study_plan.Records(folder / "study.jsonl")
    text = study_tables.write(plan, records, folder)
    # The last column of a test table is seconds.
    return re.sub(r"\| \d+ \|$", "|", text, flags=re.MULTILINE)


@pytest.mark.on_torch
@pytest.mark.filterwarnings("ignore")
def test_a_study_that_was_killed_goes_on_and_ends_the_same(tmp_path, capsys):
    plan = plan_of(equal_compute={"methods": ["SFT"], "reference": "EBFT"})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    arguments = argparse.Namespace(folder=whole, minutes=None, units=None)
    study.go_on(plan, Snapshot(whole / "study.jsonl"), arguments)
    records = study_plan.Records(whole / "study.jsonl")
    assert study_plan.next_unit(plan, records) is None
    # The base, as runs find it, is the one that was trained.
    trained = records.get("base", "numbers", 0)["cross_entropy"]
    start = records.get("start", "numbers", "validation")["measured"]
    assert start["cross_entropy"] == pytest.approx(trained, abs=1e-5)
    assert start["kl_from_base"] == pytest.approx(0.0, abs=1e-6)
    tested = records.get("test", "numbers", "EBFT", "documents", 1e-2, 0)["measured"]
    assert tested["kl_from_base"] > 0.0
    assert tested["cross_entropy"] != pytest.approx(start["cross_entropy"], abs=1e-6)

    # Rates are chosen with the first seed: only that is validated.
    validated = {
        unit[5]
        for unit, line in records.kind("run", "numbers").items()
        if "validation" in line
    }
    assert validated == {0}
    _, _, compute = tables_of(plan, whole).partition("### Equal compute")
    rows = re.findall(r"^\| (\w+) \| [\d.^]+ \|", compute, re.MULTILINE)
    assert rows == ["SFT", "EBFT"]

    assert len((killed / "study.jsonl").read_text("utf-8").splitlines()) == 6
    with (killed / "study.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"unit": ["run", "numb')
    arguments = argparse.Namespace(folder=killed, minutes=None, units=1)
    for units in (1, None):
        arguments.units = units
        study.go_on(plan, study_plan.Records(killed / "study.jsonl"), arguments)
    assert "Stopped before admission" in capsys.readouterr().out
    assert without_seconds(killed / "study.jsonl") == without_seconds(
        whole / "study.jsonl"
    )
    assert tables_of(plan, killed) == tables_of(plan, whole)
    assert (whole / "numbers.png").stat().st_size > 5_000


@pytest.mark.backend_independent
def test_time_that_is_left():
    assert study.left_after(None, 0.0, [9e9]) == float("inf")
    import time

    now = time.monotonic()
    assert study.left_after(10, now - 300, [200.0, 250.0]) > 0
    assert study.left_after(10, now - 300, [310.0]) < 0
    assert study.left_after(10, now - 601, None) < 0


def test_processors_are_no_accelerators(capsys):
    if study.accelerators():
        study.check_device()
        assert "Devices: " in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="processors alone"):
            study.check_device()
