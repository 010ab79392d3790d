"""Makes `docs/report.png`: the page of a short run on SmolLM2, as a browser shows it.

    KERAS_BACKEND=jax python docs/make_report_picture.py

Needs a Chromium; trains for some minutes on two cores.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402

import keras_ebft  # noqa: E402


def train(folder, steps):
    """The demo's fine-tuning, with completions every few steps and a history."""
    arguments = quickstart.make_parser().parse_args(["--steps", str(steps)])
    causal_lm, training, held_out = quickstart.prepare(arguments)
    model = quickstart.build_model(causal_lm, arguments, stride=32)
    completions = keras_ebft.callbacks.Completions(
        held_out[:2],
        every=steps,
        unit="steps",
        at_start=True,
        path=folder / "completions.jsonl",
        show=False,
    )
    model.compile(keras_ebft.recipes.qa_code().optimizer(steps, 2e-3))
    history = model.fit(
        training[: 2 * steps],
        batch_size=2,
        epochs=4,
        steps_per_epoch=steps // 4,
        callbacks=[completions],
    )
    return keras_ebft.report(
        {"SmolLM2-135M": history},
        folder / "report.html",
        folder / "completions.jsonl",
    )


def main():
    """Trains, writes the page and photographs it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("outputs/report"))
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit(
            "Expected a Chromium. Install one, for example `apt install chromium`."
        )
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    page = train(arguments.folder, arguments.steps)
    picture = Path(__file__).parent / "report.png"
    options = ["--headless", "--no-sandbox", "--hide-scrollbars"]
    options += ["--window-size=1250,1250", f"--screenshot={picture}"]
    subprocess.run([browser, *options, page.resolve().as_uri()], check=True)
    print(picture)


if __name__ == "__main__":
    main()
