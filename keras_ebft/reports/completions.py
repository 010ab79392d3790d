"""What `callbacks.Completions` wrote, read for people to compare."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

REWARDS = ("alignment", "diversity", "reward", "advantage")
# From this many nats on a token is as red as can be.
MOST_SURPRISE = 6.0


class Place(NamedTuple):
    """A block, and what was written in it.

    Attributes:
        row: int.
        anchor: int.
        prompt: str.
        truth: str.
        columns: list of `(label, rollouts)`; each rollout a dict of `tokens`, a list of
            `(text, hint, share)` with how surprising each is from 0 to 1, and of
            `rewards` by name, strings.
    """

    row: int
    anchor: int
    prompt: str
    truth: str
    columns: list[tuple[str, list[dict[str, Any]]]]


def read_completions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file, of equal step, row and anchor the last one.

    Raises:
        ValueError: if there is no whole line.
        OSError: if the file cannot be read.
    """
    found = {}
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                # A process was killed while it wrote this one.
                continue
            found[record["step"], record["row"], record["anchor"]] = record
    if not found:
        raise ValueError(
            f"Expected lines that callbacks.Completions wrote in {path}. Received: "
            "none. Pass the `path` that it was given, after it has fired."
        )
    return [found[place] for place in sorted(found)]


def places_of(runs: dict[str, list[dict[str, Any]]]) -> list[Place]:
    """The blocks of all runs, with what is compared in each.

    Args:
        runs: dict from a run's name to its records, by step.

    Returns:
        list of `Place`: of one run with the first and the last step, of several with
        the last step of each.
    """
    chosen = []
    for name, records in runs.items():
        steps = sorted({record["step"] for record in records})
        kept = [steps[-1]] if len(runs) > 1 else sorted({steps[0], steps[-1]})
        for step in kept:
            label = f"{name}, step {step}" if len(runs) > 1 else f"step {step}"
            own = {(r["row"], r["anchor"]): r for r in records if r["step"] == step}
            chosen.append((label, own))
    places = sorted({place for _, own in chosen for place in own})
    return [_place(place, chosen) for place in places]


def _place(place: tuple[int, int], chosen: list[Any]) -> Place:
    there = [(label, own[place]) for label, own in chosen if place in own]
    first = there[0][1]
    columns = [
        (label, [_rollout(rollout) for rollout in record["rollouts"]])
        for label, record in there
    ]
    return Place(*place, _text(first["prompt"]), _text(first["truth"]), columns)


def _rollout(rollout: dict[str, Any]) -> dict[str, Any]:
    tokens = [
        (_marked(token), *_surprise(log_prob))
        for token, log_prob in zip(rollout["tokens"], rollout["log_prob"])
    ]
    rewards = {name: _decimals(rollout[name]) for name in REWARDS}
    return {"tokens": tokens, "rewards": rewards}


def _surprise(log_prob: float | None) -> tuple[str, float]:
    if log_prob is None:
        return "not finite", 1.0
    return f"{log_prob:.2f} nats", round(min(-log_prob / MOST_SURPRISE, 1.0), 3)


def _marked(token: str) -> str:
    """A token whose line ends can be seen."""
    return token.replace("\n", "↵\n")


def _text(text: Any) -> str:
    return text if isinstance(text, str) else " ".join(map(str, text))


def _decimals(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_decimals, value))
    return "-" if value is None else f"{value:.3f}"
