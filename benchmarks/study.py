"""Does EBFT help? Base, SFT, RLVR and EBFT, each with a learning rate of its own.

    KERAS_BACKEND=jax python benchmarks/study.py benchmarks/plans/cpu_small.json \
        --folder runs/cpu_small --minutes 30
    python benchmarks/study.py benchmarks/plans/cpu_small.json \
        --folder runs/cpu_small --tables

A plan says which model, tasks, methods, learning rates and seeds. What is finished is
a line in `FOLDER/study.jsonl`, and a study that is started again goes on after the
last line, on another machine too if the folder comes along. The same command once more,
at the same time, shares the work: one process for each core, or each GPU with
`CUDA_VISIBLE_DEVICES`. `--tables` makes `tables.md` and pictures of what is there, at
any time. How a study is made, and what can be concluded from one: docs/evidence.md.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import study_plan

# How often a process that others have left nothing to do looks again.
WAIT_SECONDS = 5.0


def read_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path, help="JSON, see benchmarks/plans")
    parser.add_argument("--folder", type=Path, required=True, help="for all results")
    parser.add_argument(
        "--minutes", type=float, default=None, help="begin no unit that ends later"
    )
    parser.add_argument("--units", type=int, default=None, help="do so many, then stop")
    parser.add_argument("--tables", action="store_true", help="make tables and stop")
    parser.add_argument("--status", action="store_true", help="say what is left")
    parser.add_argument(
        "--device-check", action="store_true", help="refuse to run without a GPU or TPU"
    )
    return parser.parse_args()


def main():
    """Does units until everything, or the time, is over."""
    arguments = read_arguments()
    plan = study_plan.read_plan(arguments.plan)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    records = study_plan.Records(arguments.folder / "study.jsonl")
    keep_plan(plan, arguments.folder)
    if arguments.tables:
        import study_tables

        print(study_tables.write(plan, records, arguments.folder))
        return
    if arguments.status:
        print(f"{len(records.lines)} units are done. Next: {next_words(plan, records)}")
        return
    # Compiled programs outlive the process; read when JAX is imported.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(arguments.folder.resolve() / "compiled")
    )
    if arguments.device_check:
        check_device()
    go_on(plan, records, arguments)


def keep_plan(plan, folder):
    """Writes the plan beside its results; refuses a folder of another plan.

    Raises:
        ValueError: if the folder has results of another plan.
    """
    path = folder / "plan.json"
    text = json.dumps(plan, indent=1) + "\n"
    if path.exists() and path.read_text("utf-8") != text:
        raise ValueError(
            f"Expected the plan that {path} holds. Received: another. Take another "
            "folder, or put the plan back."
        )
    path.write_text(text, "utf-8")


def accelerators():
    """Names of the devices that are no processors."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    found = keras.distribution.list_devices()
    return [name for name in map(str, found) if "cpu" not in name.lower()]


def check_device():
    """Ends the program where there is no accelerator.

    Raises:
        ValueError: if there is none.
    """
    found = accelerators()
    if not found:
        raise ValueError(
            "Expected a GPU or TPU, which this plan is made for. Received: processors "
            "alone. Take the plan cpu_small, or another backend."
        )
    print(f"Devices: {', '.join(found)}", flush=True)


def next_words(plan, records):
    """The next unit in words."""
    unit = study_plan.next_unit(plan, records)
    return "nothing" if unit is None else " ".join(map(str, unit))


def go_on(plan, records, arguments):
    """Does unit after unit, beside other processes that do the same."""
    with study_plan.Claims(arguments.folder / "claims") as claims:
        workshop, seconds, begin, done = None, {}, time.monotonic(), 0
        while study_plan.next_unit(plan, records) is not None:
            unit = study_plan.claim_unit(plan, records, claims)
            usual = seconds.setdefault(unit and unit[0], [])
            left = left_after(arguments.minutes, begin, usual)
            if left < 0 or done == arguments.units:
                print(f"Stopped before {next_words(plan, records)}.", flush=True)
                return
            if unit is None:
                # Others are at all that can be done now.
                time.sleep(WAIT_SECONDS)
                continue
            if workshop is not None and workshop.name != unit[1]:
                # Two tasks' models at once are too much for some machines.
                workshop = None
            start = time.monotonic()
            workshop = do_unit(unit, plan, records, arguments.folder, workshop)
            usual.append(time.monotonic() - start)
            claims.release()
            done += 1
    print("Everything is done. --tables makes the tables.", flush=True)


def do_unit(unit, plan, records, folder, workshop):
    """Does a unit and writes its line.

    Args:
        unit: tuple, see `study_plan`.
        plan: dict, see `study_plan`.
        records: `study_plan.Records`.
        folder: `pathlib.Path`, for all results.
        workshop: `study_runs.Workshop` of the unit's task, or `None` to make one.

    Returns:
        `study_runs.Workshop`.
    """
    import keras
    import study_runs
    from harness import machine

    start = time.monotonic()
    if workshop is None:
        workshop = study_runs.Workshop(plan, unit[1], folder / "weights", records)
    found = workshop.do(unit)
    spent = time.monotonic() - start
    where = {**machine(), "backend": keras.backend.backend()}
    records.add(unit, {**found, "unit_seconds": round(spent, 1), "machine": where})
    workshop.tidy()
    print(f"[{spent:.0f} s] {' '.join(map(str, unit))}: {in_short(found)}", flush=True)
    return workshop


def left_after(minutes, begin, seconds):
    """Seconds that will be left after a unit, by what such units took so far."""
    if minutes is None:
        return float("inf")
    expected = statistics.median(seconds) if seconds else 0.0
    return 60.0 * minutes - (time.monotonic() - begin) - expected


def in_short(found):
    """What a unit found, in a few words."""
    measured = found.get("validation") or found.get("measured") or found
    names = ("greedy", "sampled", "cross_entropy", "admitted", "advice")
    return ", ".join(
        f"{name} {measured[name]:.4f}"
        if isinstance(measured[name], float)
        else f"{name} {measured[name]}"
        for name in names
        if name in measured
    )


if __name__ == "__main__":
    main()
