"""What a study has to do, what it has done, and what comes next. No tensors.

A *unit* is a tuple, and the JSONL file has a line for each that was finished:

    ("base", task, i)                          a stretch of training the base
    ("start", task, part)                      the base measured on a part
    ("audit", task)                            what `RewardAudit` recommends
    ("run", task, method, budget, rate, seed)  training; the first seeds are validated
    ("admission", task)                        whether the base was admitted
    ("test", task, method, budget, rate, seed) a chosen run, measured on test

What comes next follows from the plan and the file alone, so that a study that was
killed goes on, on another machine too, and several processes can share one.
"""

import contextlib
import fcntl
import hashlib
import json
import statistics
from pathlib import Path

DOCUMENTS, COMPUTE = "documents", "compute"
START = "base"
# A base is admitted within these, if more of the same training gains less than this.
ADMITTED = (0.25, 0.75)
MOST_GAIN = 0.02
# What must fall for the base's training to go on, in nats per answer token.
LEAST_FALL = 0.01

DEFAULTS = {
    "model": {"kind": "smollm2"},
    "adapters": 16,
    "length": 64,
    "batch_size": 4,
    "steps": 100,
    "seeds": [0, 1, 2],
    "screening_seeds": 1,
    "base": {},
    "audit": {},
    "evaluation": {},
    "equal_compute": {},
    "about": "",
}
BASE = {
    "learning_rate": 1e-3,
    "batch_size": 4,
    "steps_each": 50,
    "most_steps": 1000,
    "documents": 64,
}
AUDIT = {"rows": 24, "batch_size": 4}
EVALUATION = {
    "samples": 4,
    "k": [1, 4],
    "temperature": 1.0,
    "batch_size": 32,
    "rollout_lengths": [1, 2, 4],
    "feature_rows": 16,
    "feature_samples": 4,
    "sampler": {"context_length": 4, "stride": 4},
    "distance_documents": 32,
}
EQUAL_COMPUTE = {"methods": [], "reference": None}
METHOD = ("kind", "learning_rates", "recipe", "sampler", "features", "reward")
METHOD += ("options", "audit", "network", "only")


def read_plan(path):
    """A plan with everything filled in.

    Raises:
        ValueError: for entries that are missing or unknown.
    """
    return complete(json.loads(Path(path).read_text("utf-8")))


def complete(given):
    """A plan with defaults filled in, checked."""
    plan = _filled("the plan", given, {**DEFAULTS, "tasks": None, "methods": None})
    for name, defaults in (
        ("base", BASE),
        ("audit", AUDIT),
        ("evaluation", EVALUATION),
        ("equal_compute", EQUAL_COMPUTE),
    ):
        plan[name] = _filled(f"`{name}`", plan[name], defaults)
    if not plan["tasks"] or not plan["methods"]:
        raise ValueError("Expected a plan with `tasks` and `methods`. Received: none.")
    for name, method in plan["methods"].items():
        _filled(f"method {name!r}", method, dict.fromkeys(METHOD))
        if not method.get("learning_rates"):
            raise ValueError(
                f"Expected `learning_rates` of method {name!r}. Received: none."
            )
        if method.get("kind") not in ("sft", "rlvr", "ebft"):
            raise ValueError(
                f"Expected method {name!r} of kind sft, rlvr or ebft. Received: "
                f"{method.get('kind')!r}."
            )
    extra = plan["equal_compute"]
    unknown = {*extra["methods"], *filter(None, [extra["reference"]])}
    unknown -= set(plan["methods"])
    if unknown:
        raise ValueError(
            f"Expected `equal_compute` to name methods of the plan, "
            f"{list(plan['methods'])}. Received: {sorted(unknown)}."
        )
    for task in plan["tasks"]:
        # Steps at equal compute are counted from its runs.
        if methods_of(plan, task, COMPUTE) and extra["reference"] not in methods_of(
            plan, task, DOCUMENTS
        ):
            raise ValueError(
                "Expected `equal_compute` with a `reference` that is run on every task "
                f"of its methods. Received: {extra['reference']!r} for {task!r}."
            )
    if not 1 <= plan["screening_seeds"] <= len(plan["seeds"]):
        raise ValueError(
            f"Expected `screening_seeds` from 1 to {len(plan['seeds'])}, the number of "
            f"seeds. Received: {plan['screening_seeds']}."
        )
    return plan


def _filled(what, given, defaults):
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(
            f"Expected {what} with entries of {sorted(defaults)}. Received: {unknown}."
        )
    return {**defaults, **given}


@contextlib.contextmanager
def _alone(path):
    """While no other process is in here for the same file."""
    with path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Records:
    """The JSONL file of a study: one line for every finished unit.

    Args:
        path: `pathlib.Path`. A last line that was cut off by a kill is removed.
    """

    def __init__(self, path):
        self.path = path
        self.lines = {}
        self._read = 0
        self.refresh()

    def refresh(self):
        """Reads what has been added since, by other processes too."""
        if not self.path.exists():
            return
        # Nobody is writing then: a line without an end was cut off.
        with _alone(self.path), self.path.open("r+b") as file:
            file.seek(self._read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            if whole != new:
                file.truncate(self._read)
        for line in map(json.loads, whole.splitlines()):
            self.lines[tuple(line["unit"])] = line

    def add(self, unit, found):
        """Appends a finished unit."""
        line = json.dumps({"unit": list(unit), **found}) + "\n"
        with _alone(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self.refresh()

    def get(self, *unit):
        """The line of a unit, or `None`."""
        return self.lines.get(unit)

    def __contains__(self, unit):
        return tuple(unit) in self.lines

    def kind(self, kind, task):
        """Lines of one kind and task, by unit."""
        return {u: v for u, v in self.lines.items() if u[:2] == (kind, task)}


class Claims:
    """Which units the processes of a study are at, each a lock on a file.

    The system gives a lock back when its process ends, however it ends.

    Args:
        folder: `pathlib.Path`, the same for all processes, which share a machine.
    """

    def __init__(self, folder):
        self._folder = folder
        self._file = None

    def take(self, unit):
        """Takes a unit, unless another process has it.

        Returns:
            bool, whether it is this process's.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(unit).encode()).hexdigest()[:16]
        file = (self._folder / name).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def release(self):
        """Gives back the unit that was taken last, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.release()


def next_unit(plan, records):
    """The first unit that is not done, or `None` when everything is done."""
    return next((u for u in units(plan, records) if u not in records), None)


def claim_unit(plan, records, claims):
    """Takes the first unit that is not done, can be done and that nobody is at.

    Returns:
        tuple, or `None` where there is none.
    """
    records.refresh()
    for unit in units(plan, records):
        if unit in records or not is_ready(plan, records, unit):
            continue
        if not claims.take(unit):
            continue
        # It may have been finished between the two looks.
        records.refresh()
        if unit not in records:
            return unit
        claims.release()
    return None


def is_ready(plan, records, unit):
    """Whether what a unit needs of others is done."""
    if unit[0] == "test":
        return ("run", *unit[1:]) in records
    if unit[0] == "run" and unit[3] == COMPUTE:
        names = plan["equal_compute"]["reference"], unit[2]
        return all(_runs(records, unit[1], name) for name in names)
    return True


def _runs(records, task, method):
    """Lines of the runs of a method at equal documents."""
    found = records.kind("run", task).items()
    return [line for unit, line in found if unit[2:4] == (method, DOCUMENTS)]


def units(plan, records):
    """All units in order, as far as can be known from what is done."""
    for task in plan["tasks"]:
        if (yield from _until_known(_start_units(plan, records, task), records)):
            continue
        yield from _screening(plan, records, task, DOCUMENTS)
        if not is_screened(plan, records, task, first_sft(plan), DOCUMENTS):
            continue
        yield ("admission", task)
        yield from _chosen_units(plan, records, task, DOCUMENTS)
    for task in plan["tasks"]:
        if plan["equal_compute"]["methods"]:
            yield from _screening(plan, records, task, COMPUTE)
            yield from _chosen_units(plan, records, task, COMPUTE)


def _until_known(generator, records):
    """Yields units; returns whether what follows them cannot be known yet."""
    for unit in generator:
        yield unit
        if unit not in records:
            return True
    return False


def _start_units(plan, records, task):
    index = 0
    while not base_is_trained(plan, records, task):
        yield ("base", task, index)
        index += 1
    for part in ("validation", "test"):
        yield ("start", task, part)
    if any(method.get("audit") for method in plan["methods"].values()):
        yield ("audit", task)


def base_is_trained(plan, records, task):
    """Whether the validation loss of the base has stopped falling, twice in a row.

    After the first time the learning rate is a tenth.
    """
    losses = [line["cross_entropy"] for line in base_lines(records, task)]
    if len(losses) * plan["base"]["steps_each"] >= plan["base"]["most_steps"]:
        return True
    return stalls(losses) >= 2


def stalls(losses):
    """How often a loss did not fall below the lowest before it."""
    lowest, count = float("inf"), 0
    for loss in losses:
        count += loss > lowest - LEAST_FALL
        lowest = min(lowest, loss)
    return count


def base_lines(records, task):
    """Lines of the base's training, in order."""
    found = records.kind("base", task)
    return [found[unit] for unit in sorted(found, key=lambda unit: unit[2])]


def best_base(lines):
    """Which stretch of the base's training ended with the lowest validation loss."""
    return min(range(len(lines)), key=lambda index: lines[index]["cross_entropy"])


def first_sft(plan):
    """The method that continues what the base was trained with, or `None`."""
    for name, method in plan["methods"].items():
        if method["kind"] == "sft":
            return name
    return None


def methods_of(plan, task, budget):
    """Names of the methods that a task is tried with."""
    names = plan["equal_compute"]["methods"] if budget == COMPUTE else plan["methods"]
    return [
        name
        for name in names
        if task in (plan["methods"][name].get("only") or plan["tasks"])
    ]


def rates(plan, method):
    """Learning rates of a method."""
    return plan["methods"][method]["learning_rates"]


def screening_seeds(plan):
    """Seeds that learning rates are chosen with; the others are not validated."""
    return plan["seeds"][: plan["screening_seeds"]]


def _screening(plan, records, task, budget):
    for seed in screening_seeds(plan):
        for method in methods_of(plan, task, budget):
            for rate in rates(plan, method):
                yield ("run", task, method, budget, rate, seed)


def is_screened(plan, records, task, method, budget):
    """Whether every learning rate of a method has its screening seeds."""
    if method is None:
        return True
    return all(
        ("run", task, method, budget, rate, seed) in records
        for rate in rates(plan, method)
        for seed in screening_seeds(plan)
    )


def choose_rate(plan, records, task, method, budget=DOCUMENTS):
    """The learning rate with the best screening runs **on validation documents**.

    Highest mean score of greedy answers; among equals the lowest cross-entropy. Lines
    of test documents are not looked at.

    Returns:
        float, or `None` before all rates have been tried.
    """
    if not is_screened(plan, records, task, method, budget):
        return None

    def merit(rate):
        found = [
            records.get("run", task, method, budget, rate, seed)["validation"]
            for seed in screening_seeds(plan)
        ]
        return (
            statistics.fmean(v["greedy"] for v in found),
            -statistics.fmean(v["cross_entropy"] for v in found),
        )

    return max(rates(plan, method), key=merit)


def is_at_edge(plan, method, rate):
    """Whether a chosen rate is the lowest or highest of those tried."""
    tried = rates(plan, method)
    return len(tried) > 1 and rate in (min(tried), max(tried))


def _chosen_units(plan, records, task, budget):
    chosen = {
        method: choose_rate(plan, records, task, method, budget)
        for method in methods_of(plan, task, budget)
    }
    for seed in plan["seeds"]:
        for method, rate in chosen.items():
            if rate is not None:
                yield ("run", task, method, budget, rate, seed)
                yield ("test", task, method, budget, rate, seed)


def admission(plan, records, task):
    """Whether the base may stand for one that supervised training is done with.

    Returns:
        dict of `admitted`, `accuracy` of the base, `gains` of continued supervised
        training by learning rate, all on validation documents, and `reasons`.
    """
    accuracy = records.get("start", task, "validation")["measured"]["greedy"]
    method, gains = first_sft(plan), {}
    for rate in rates(plan, method) if method else ():
        found = [
            records.get("run", task, method, DOCUMENTS, rate, seed)
            for seed in screening_seeds(plan)
        ]
        values = [line["validation"]["greedy"] for line in found]
        gains[f"{rate:g}"] = statistics.fmean(values) - accuracy
    reasons = []
    if not ADMITTED[0] <= accuracy <= ADMITTED[1]:
        reasons.append(f"it scores {accuracy:.3f}, not from .25 to .75")
    if not gains:
        reasons.append("no supervised training was continued")
    if gains and max(gains.values()) >= MOST_GAIN:
        reasons.append(f"continued training gains {max(gains.values()):.3f}")
    return {
        "admitted": not reasons,
        "accuracy": accuracy,
        "gains": gains,
        "reasons": reasons,
    }


def finished_states(plan, records, task):
    """Runs whose weights nobody needs any more."""
    for unit in records.kind("run", task):
        _, _, method, budget, rate, _ = unit
        chosen = choose_rate(plan, records, task, method, budget)
        if chosen is None:
            continue
        if rate != chosen or ("test", *unit[1:]) in records:
            yield unit


def equal_compute_steps(plan, records, task, method):
    """Steps of a method that pass as many tokens as the reference's run.

    Raises:
        ValueError: if the reference has not been run.
    """
    reference = plan["equal_compute"]["reference"]
    costs = {}
    for name in (reference, method):
        found = _runs(records, task, name)
        if not found:
            raise ValueError(
                f"Expected runs of {name!r} at equal documents, before those at equal "
                "compute. Received: none."
            )
        costs[name] = found[0]["passes_per_step"]
    return max(round(plan["steps"] * costs[reference] / costs[method]), 1)
