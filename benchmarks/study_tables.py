"""Tables and pictures of a study, from its JSONL file alone."""

import statistics
from pathlib import Path

import numpy as np
import study_plan
from harness import table

from keras_ebft.evaluation import paired_change

TITLES = {
    study_plan.DOCUMENTS: "Equal documents",
    study_plan.COMPUTE: "Equal compute",
}


def write(plan, records, folder):
    """Writes `tables.md` and a picture for every task.

    Returns:
        str, the page.
    """
    parts = []
    for task in plan["tasks"]:
        parts += [f"## {task}", *page(plan, records, task)]
        figure = picture(plan, records, task)
        if figure is not None:
            figure.savefig(Path(folder) / f"{task}.png", dpi=120)
    text = "\n\n".join(parts) + "\n"
    (Path(folder) / "tables.md").write_text(text, "utf-8")
    return text


def page(plan, records, task):
    """Paragraphs and tables of a task, of what is there."""
    parts = [base_table(records, task)]
    found = records.get("admission", task)
    if found:
        parts.append(admission_words(found))
    found = records.get("audit", task)
    if found:
        parts.append(f"Audit: {found['advice']}")
    for budget in (study_plan.DOCUMENTS, study_plan.COMPUTE):
        if budget == study_plan.COMPUTE and not plan["equal_compute"]["methods"]:
            continue
        parts.append(f"### {TITLES[budget]}")
        parts.append(screening_table(plan, records, task, budget))
        parts.append(test_table(plan, records, task, budget))
    return [part for part in parts if part]


def base_table(records, task):
    """How the base was trained."""
    lines = study_plan.base_lines(records, task)
    if not lines:
        return "The base is as it came: no line of its training."
    rows = [
        (
            line["steps"],
            f"{line['learning_rate']:g}",
            f"{line['loss']:.4f}",
            f"{line['cross_entropy']:.4f}",
            f"{line['greedy']:.3f}",
        )
        for line in lines
    ]
    columns = ("base: steps", "rate", "training loss", "validation loss", "greedy")
    return table(columns, rows)


def admission_words(found):
    """Whether the base was admitted, in a sentence."""
    gains = ", ".join(f"{v:+.3f} at {k}" for k, v in found["gains"].items())
    verdict = "Admitted" if found["admitted"] else "**Not admitted**"
    reasons = f": {'; '.join(found['reasons'])}" if found["reasons"] else ""
    return (
        f"{verdict}{reasons}. Base {found['accuracy']:.3f} on validation documents; "
        f"continued supervised training {gains}."
    )


def screening_table(plan, records, task, budget):
    """Greedy score on validation documents by method and rate."""
    rows = []
    for method in study_plan.methods_of(plan, task, budget):
        chosen = study_plan.choose_rate(plan, records, task, method, budget)
        cells = []
        for rate in study_plan.rates(plan, method):
            found = [
                records.get("run", task, method, budget, rate, seed)
                for seed in study_plan.screening_seeds(plan)
            ]
            found = [line["validation"] for line in found if line]
            if not found:
                cells.append(f"{rate:g}: -")
                continue
            greedy = statistics.fmean(v["greedy"] for v in found)
            loss = statistics.fmean(v["cross_entropy"] for v in found)
            mark = "**" if rate == chosen else ""
            cells.append(f"{mark}{rate:g}: {greedy:.3f} ({loss:.4f}){mark}")
        rows.append((method, "; ".join(cells)))
    columns = ("validation", "rate: greedy (cross-entropy); the chosen one in bold")
    return table(columns, rows)


def chosen_lines(plan, records, task, method, budget):
    """The chosen rate, and the runs and test lines of its seeds so far."""
    rate = study_plan.choose_rate(plan, records, task, method, budget)
    found = []
    for seed in plan["seeds"] if rate is not None else ():
        settings = (task, method, budget, rate, seed)
        run, test = records.get("run", *settings), records.get("test", *settings)
        if run and test:
            found.append((run, test["measured"]))
    return rate, found


def test_table(plan, records, task, budget):
    """What chosen runs do on test documents."""
    base = records.get("start", task, "test")
    if base is None:
        return ""
    base = base["measured"]
    names = [n for n in base if n.startswith(("sampled", "best@", "unbiased"))]
    names += ["entropy", "kl_from_base"]
    columns = ["test", "rate", "seeds", "greedy", "from base", "from SFT"]
    columns += ["cross-entropy", "from base", *map(short, names)]
    columns += ["steps", "token passes", "CPU s"]
    rows = [base_row(base, names)]
    sft = study_plan.first_sft(plan)
    _, compared = chosen_lines(plan, records, task, sft, budget) if sft else (0, [])
    for method, where in rows_of(plan, task, budget):
        rate, found = chosen_lines(plan, records, task, method, where)
        if found:
            rows.append(method_row(plan, method, rate, found, base, compared, names))
    documents = len(base["per_document"]["greedy"])
    return (
        table(columns, rows)
        + f"\n\n{documents} test documents. A number is the mean over "
        "seeds, in brackets their standard deviation; ± is half of a 95 % interval of "
        "the paired difference over documents, each with the mean of its seeds. "
        "^: the rate is the lowest or highest that was tried."
    )


def rows_of(plan, task, budget):
    """Methods of a table, and the budget of their runs.

    At equal compute those that were given more steps come first, and after them the
    others as they are, with what they took.
    """
    found = dict.fromkeys(study_plan.methods_of(plan, task, budget), budget)
    for method in study_plan.methods_of(plan, task, study_plan.DOCUMENTS):
        found.setdefault(method, study_plan.DOCUMENTS)
    return list(found.items())


def short(name):
    """A column's heading."""
    name = name.replace("unbiased_feature_matching_loss@", "FM loss, G=")
    return name.replace("kl_from_base", "KL from base")


def base_row(base, names):
    """The first line of a table."""
    cells = ["base", "", "", f"{base['greedy']:.3f}", "", ""]
    cells += [f"{base['cross_entropy']:.4f}", ""]
    return [*cells, *(f"{base[name]:.4f}" for name in names), "", "", ""]


def method_row(plan, method, rate, found, base, compared, names):
    """A method's line."""
    tests = [test for _, test in found]
    edge = "^" if study_plan.is_at_edge(plan, method, rate) else ""
    of_sft = [test for _, test in compared]
    is_sft = method == study_plan.first_sft(plan)
    return [
        method,
        f"{rate:g}{edge}",
        len(found),
        spread([test["greedy"] for test in tests], 3),
        change([base], tests, "greedy"),
        change(of_sft, tests, "greedy") if of_sft and not is_sft else "",
        spread([test["cross_entropy"] for test in tests], 4),
        change([base], tests, "cross_entropy"),
        *(spread([test[name] for test in tests], 4) for name in names),
        found[0][0]["steps"],
        f"{found[0][0]['steps'] * found[0][0]['passes_per_step'] / 1000:.1f}k",
        f"{statistics.fmean(run['cpu_seconds'] for run, _ in found):.0f}",
    ]


def spread(values, digits):
    """Mean, and standard deviation where there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({statistics.stdev(values):.{digits}f})"
    return text


def change(before, after, name):
    """Paired difference over documents, each the mean of its seeds."""

    def of_documents(measured):
        return np.mean([m["per_document"][name] for m in measured], axis=0)

    mean, half = paired_change(of_documents(before), of_documents(after))
    return f"{mean:+.3f} ± {half:.3f}"


def picture(plan, records, task):
    """Accuracy against cross-entropy on test documents, a point for each seed."""
    from keras_ebft.plots import accuracy_plane

    base = records.get("start", task, "test")
    if base is None:
        return None
    points = {"base": [(base["measured"]["cross_entropy"], base["measured"]["greedy"])]}
    for method in study_plan.methods_of(plan, task, study_plan.DOCUMENTS):
        _, found = chosen_lines(plan, records, task, method, study_plan.DOCUMENTS)
        if found:
            points[method] = [(t["cross_entropy"], t["greedy"]) for _, t in found]
    return accuracy_plane(
        points,
        accuracy_label="greedy score on test documents",
        likelihood_label="cross-entropy on test documents (nats/token)",
        joined=False,
    )
