"""Where completions go: a file, the screen, and the places where runs are kept.

Each writer has `begin` and `end`, called with training, and `write(step, epoch,
blocks)` with the blocks that `EBFTModel.completions` returns.
"""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

Blocks = list[dict[str, Any]]
REWARDS = ("alignment", "diversity", "reward", "advantage")
COLUMNS = ("step", "row", "anchor", "prompt", "truth", "rollout", *REWARDS)
# What means something in Markdown or HTML.
ESCAPED = {
    ord(character): f"&#{ord(character)};" for character in "&<>\\`*_{}[]()#+-!|~"
}
# What is shown of a prompt: its end.
PROMPT_LENGTH = 200


class Writer:
    """What all writers do that have nothing else to do."""

    def begin(self) -> None:
        """Called when training begins."""

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Called when there are completions.

        Args:
            step: int, batches that were trained on.
            epoch: int, from 0.
            blocks: list of dicts.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Called when training ends."""


class JsonLines(Writer):
    """A file with one line per block, to which lines are added and nothing else."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def begin(self) -> None:
        """Makes the folder, and fails now if the file cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a"):
            pass

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Adds the lines, in one piece."""
        head = {"step": step, "epoch": epoch, "time": time.time()}
        lines = [
            json.dumps({**head, **block}, ensure_ascii=False, allow_nan=False) + "\n"
            for block in blocks
        ]
        data = "".join(lines).encode()
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                # A process was killed while it wrote: its line stays one of its own.
                data = b"\n" + data
            file.write(data)


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


class PrintedTable(Writer):
    """Tables on the screen, one per block."""

    def __init__(self) -> None:
        _optional("rich", "rich")

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Prints them."""
        from rich.console import Console

        console = Console()
        # A progress bar may have left its line open.
        console.print()
        for block in blocks:
            console.print(_table(step, block))


def _table(step: int, block: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    place = f"step {step}, row {block['row']}, anchor {block['anchor']}"
    table = Table(title=Text(f"{place}\n{_prompt_end(block)}"), title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("continuation", overflow="fold", ratio=1)
    for name in REWARDS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("truth", Text(_visible(block["truth"])), *[""] * len(REWARDS))
    for number, rollout in enumerate(block["rollouts"]):
        numbers = [_decimals(rollout[name]) for name in REWARDS]
        table.add_row(str(number), Text(_visible(rollout["text"])), *numbers)
    return table


class TensorBoardText(Writer):
    """Texts in TensorBoard."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._module = _optional("tensorboardX", "tensorboardX", "tensorboard")
        self._writer: Any = None

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Adds one text for each document."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(self.folder)
        for row in sorted({block["row"] for block in blocks}):
            own = [block for block in blocks if block["row"] == row]
            text = "\n\n".join(map(_markdown, own))
            self._writer.add_text(f"completions/row_{row}", text, step)
        self._writer.flush()

    def end(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _markdown(block: dict[str, Any]) -> str:
    head = f"**anchor {block['anchor']}** {_code(_prompt_end(block))}"
    lines = [
        f"| | continuation | {' | '.join(REWARDS)} |",
        f"|---|---|{'---:|' * len(REWARDS)}",
        f"| truth | {_code(_visible(block['truth']))} |{' |' * len(REWARDS)}",
    ]
    for number, rollout in enumerate(block["rollouts"]):
        numbers = " | ".join(_decimals(rollout[name]) for name in REWARDS)
        lines.append(f"| {number} | {_code(_visible(rollout['text']))} | {numbers} |")
    return head + "\n\n" + "\n".join(lines)


def _code(text: str) -> str:
    """Text as it is, whatever it means in Markdown or HTML."""
    return f"<code>{text.translate(ESCAPED)}</code>"


class WandbTable(Writer):
    """A table in the running run of W&B."""

    def __init__(self) -> None:
        self._module = _optional("wandb", "wandb", "wandb")

    def begin(self) -> None:
        """Fails now if no run is there to write to."""
        if self._module.run is None:
            raise ValueError(
                "Expected a run of W&B for the completions. Received: none. Call "
                "wandb.init() before fit()."
            )

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Logs a table of its own."""
        rows = [[row[name] for name in COLUMNS] for row in _rows(step, blocks)]
        table = self._module.Table(columns=list(COLUMNS), data=rows)
        self._module.run.log({"completions": table, "completions_step": step})


class MlflowTable(Writer):
    """A table in the active run of MLflow, which grows."""

    def __init__(self) -> None:
        self._module = _optional("mlflow", "mlflow", "mlflow")

    def write(self, step: int, epoch: int, blocks: Blocks) -> None:
        """Adds rows."""
        rows = _rows(step, blocks)
        data = {name: [row[name] for row in rows] for name in COLUMNS}
        self._module.log_table(data, "completions.json")


def _rows(step: int, blocks: Blocks) -> list[dict[str, Any]]:
    """One flat row per rollout."""
    return [
        {
            "step": step,
            "row": block["row"],
            "anchor": block["anchor"],
            "prompt": _text(block["prompt"]),
            "truth": _text(block["truth"]),
            "rollout": _text(rollout["text"]),
            **{name: _mean(rollout[name]) for name in REWARDS},
        }
        for block in blocks
        for rollout in block["rollouts"]
    ]


def _text(text: Any) -> str:
    """A text, or token ids in its place."""
    return text if isinstance(text, str) else " ".join(map(str, text))


def _visible(text: Any) -> str:
    """A text on one line."""
    return _text(text).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")


def _prompt_end(block: dict[str, Any]) -> str:
    prompt = _visible(block["prompt"])
    return prompt if len(prompt) <= PROMPT_LENGTH else "… " + prompt[-PROMPT_LENGTH:]


def _mean(value: Any) -> float | None:
    """A reward, or the mean of one for each token."""
    if not isinstance(value, list):
        return value
    known = [part for part in value if part is not None]
    return float(np.mean(known)) if known else None


def _decimals(value: Any) -> str:
    mean = _mean(value)
    return "" if mean is None else f"{mean:.3f}"


def _optional(module: str, package: str, extra: str | None = None) -> Any:
    """A package that is needed only where it is asked for.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f'"keras_ebft[{extra}]"' if extra else package
        raise ImportError(
            f"Expected the package {package!r}, which was asked for to write "
            f"completions. Received: {error}. Install it: pip install {install}."
        ) from error
