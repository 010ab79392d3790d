"""One self-contained page about one run or several."""

import importlib.util
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_ebft import plots
from keras_ebft.model import EBFTModel
from keras_ebft.reports.completions import Place, places_of, read_completions
from keras_ebft.validation import check_int
from keras_ebft.version import __version__

METRICS = (
    "feature_matching_loss",
    "ce_loss",
    "reward",
    "matching_score",
    "token_match",
    "grad_norm",
)
TEMPLATE = "report.html.jinja"
# Of a setting, what is shown.
MOST_CHARACTERS = 200


def report(
    runs: Any,
    path: str | os.PathLike[str],
    completions: Any = None,
    *,
    metrics: Sequence[str] | None = None,
    most_blocks: int = 20,
    title: str = "Energy-Based Fine-Tuning",
) -> Path:
    """Writes one HTML page: settings, data, curves, and what the model writes.

    The page needs nothing beside itself. Rollouts stand beside the truth, each token
    coloured by how unlikely the model found it, with alignment, diversity, reward and
    advantage: of one run those of the first and the last step, of several runs those
    of the last step of each. Needs `pip install "keras_ebft[report]"`.

    Args:
        runs: `keras.callbacks.History`, what `fit` returned; or a dict from names of
            runs to histories, or to dicts from metric names to lists of values. A
            history knows the settings and the data of its run, too.
        path: path of the page; its folder is made.
        completions: path of the file that `callbacks.Completions` wrote, or a dict from
            names of runs to such paths, or `None`.
        metrics: names of the curves; by default of those that most is learned from.
        most_blocks: int, blocks that are shown.
        title: str.

    Returns:
        `pathlib.Path` of the page.

    Raises:
        ImportError: if jinja2 or matplotlib are not installed.
        TypeError: if a value is of the wrong type.
        ValueError: if there is no run or no run has one of the metrics, completions
            are of a run that is not there, or a file holds none.
        OSError: if a file cannot be read or written.

    Example:
    ```python
    completions = keras_ebft.callbacks.Completions(held_out[:4], path="ebft.jsonl")
    history = model.fit(texts, callbacks=[completions])
    keras_ebft.report(history, "report.html", "ebft.jsonl")
    ```
    """
    _check_packages()
    histories = _histories(runs)
    most_blocks = check_int("most_blocks", most_blocks, 1)
    blocks = _places(_files(completions, histories))
    page = {
        "title": title,
        "version": __version__,
        "runs": [_described(name, run) for name, run in histories.items()],
        "curves": _curves(histories, metrics),
        "values": _last_values(histories),
        "blocks": blocks[:most_blocks],
        "left_out": max(len(blocks) - most_blocks, 0),
    }
    written = Path(path)
    text = _template().render(page)
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(text, encoding="utf-8")
    return written


def _histories(runs: Any) -> dict[str, Any]:
    if isinstance(runs, keras.callbacks.History):
        runs = {"run": runs}
    if not isinstance(runs, dict) or not runs:
        raise TypeError(
            "Expected what `fit` returned, or a dict of that by names of runs. "
            f"Received: {runs!r} (of type {type(runs).__name__})."
        )
    for name, run in runs.items():
        if not isinstance(getattr(run, "history", run), dict):
            raise TypeError(
                f"Expected a History, or a dict of lists, as run {name!r}. Received: "
                f'{run!r} (of type {type(run).__name__}). Pass {{"name": history}}.'
            )
    return dict(runs)


def _files(completions: Any, histories: dict[str, Any]) -> dict[str, Any]:
    if completions is None:
        return {}
    if not isinstance(completions, dict):
        if len(histories) > 1:
            raise ValueError(
                "Expected completions by names of runs, because there are several. "
                f"Received: {completions!r}. Pass for example "
                f"completions={{{next(iter(histories))!r}: path}}."
            )
        return {next(iter(histories)): completions}
    unknown = sorted(set(completions) - set(histories))
    if unknown:
        raise ValueError(
            f"Expected completions of the runs {sorted(histories)}. Received: "
            f"{', '.join(unknown)}. Use the same names in both."
        )
    return completions


def _places(files: dict[str, Any]) -> list[Place]:
    return places_of({name: read_completions(path) for name, path in files.items()})


def _described(name: str, run: Any) -> dict[str, Any]:
    """What a history knows of its run."""
    model = getattr(run, "model", None)
    if not isinstance(model, EBFTModel):
        return {"name": name, "settings": {}, "data": None}
    parts = {
        "language model": {
            "class": type(model.causal_lm).__name__,
            "parameters": f"{model.causal_lm.count_params():,}",
        },
        "sampler": model.sampler.get_config(),
        "feature network": model.feature_network.get_config(),
        f"reward ({type(model.reward).__name__})": model.reward.get_config(),
        "objective": {"advantage": model.advantage, **model.objective.get_config()},
        f"optimizer ({type(model.optimizer).__name__})": model.optimizer.get_config(),
        "run": {"seed": model.seed, "steps": model.steps_trained},
    }
    settings = {
        part: {key: _short(value) for key, value in config.items()}
        for part, config in parts.items()
    }
    return {"name": name, "settings": settings, "data": str(model.data_report or "")}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def _curves(histories: dict[str, Any], metrics: Sequence[str] | None) -> list[str]:
    """One picture per metric, as SVG."""
    if metrics is None:
        known = {
            name.removeprefix("val_")
            for run in histories.values()
            for name in getattr(run, "history", run)
        }
        metrics = [name for name in METRICS if name in known]
    return [
        _svg(plots.training_curves(histories, (name,)), f"curve{number}-")
        for number, name in enumerate(metrics)
    ]


def _svg(figure: Any, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # What comes before the element belongs to a file of its own.
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Pictures of one page must not share names.
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def _last_values(histories: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last value of everything, by metric and run."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in histories.items():
        for metric, values in getattr(run, "history", run).items():
            if len(values):
                found.setdefault(metric, {})[name] = f"{float(values[-1]):.5g}"
    return dict(sorted(found.items()))


def _check_packages() -> None:
    packages = ("jinja2", "matplotlib")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Expected the packages {' and '.join(packages)}, which make the page. "
            f"Received: no {' and no '.join(missing)}. Install them: "
            'pip install "keras_ebft[report]".'
        )


def _template() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("keras_ebft", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)
