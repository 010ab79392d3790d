"""What the commands do."""

import json
import logging
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import keras_hub

import keras_ebft
from keras_ebft.cli import building
from keras_ebft.cli.documents import as_rows, read_documents
from keras_ebft.cli.runs import HistoryFile, RunFolder
from keras_ebft.cli.settings import RunSettings, check_settings, read_settings

logger = logging.getLogger("keras_ebft")

# Settings of `training` that are no arguments of `fit`.
NOT_OF_FIT = {"schedule_epochs", "seed", "save_freq", "compilation_cache"}


def train(options: Namespace) -> None:
    """Trains as a file says; on a folder with the same run, goes on with it."""
    settings = check_settings(read_settings(options.file, options.overrides))
    folder = RunFolder(settings.output)
    settings = claimed(folder, settings)
    epochs = settings.training.epochs
    if folder.is_finished(epochs):
        logger.info(
            "The run in '%s' has finished its %d epochs. Ask for more with "
            "training.epochs, or choose another output.",
            folder.path,
            epochs,
        )
        return
    if settings.training.compilation_cache:
        keras_ebft.use_compilation_cache()
    training, validation = read_documents(settings.data)
    model = building.build(settings)
    pack = _pack(settings)
    training = as_rows(training, pack, model.causal_lm)
    if validation is not None:
        validation = as_rows(validation, pack, model.causal_lm)
    building.compile_model(model, settings, _count(training))
    save_freq = settings.training.save_freq
    model.fit(
        training,
        validation_data=validation,
        callbacks=[
            *building.make_callbacks(settings),
            HistoryFile(folder.history),
            keras_ebft.TrainingCheckpoint(folder.checkpoint, save_freq=save_freq),
        ],
        **settings.training.model_dump(exclude=NOT_OF_FIT),
    )
    model.save_weights(folder.weights)
    model.causal_lm.save_to_preset(str(folder.preset))
    folder.finish(epochs)


def claimed(folder: RunFolder, settings: RunSettings) -> RunSettings:
    """The settings of a run that begins in a folder, or goes on there, resolved.

    Args:
        folder: `RunFolder`.
        settings: `RunSettings`; what was drawn or planned when the run began and is
            not given is the folder's.

    Raises:
        ValueError: if the folder holds another run that has trained.
    """
    for name, value in folder.written_training().items():
        if getattr(settings.training, name) is None:
            setattr(settings.training, name, value)
    said = building.resolved(settings)
    folder.claim(said)
    return check_settings(said)


def evaluate(options: Namespace) -> None:
    """Prints what a run's model measures on documents that were held out."""
    folder = RunFolder(options.folder)
    settings = folder.read_settings(options.overrides)
    training, validation = read_documents(settings.data)
    if validation is None:
        raise ValueError(
            "Expected documents to measure on. Received: a run that held none out. "
            "Name some: keras-ebft evaluate FOLDER data.validation.path=FILE."
        )
    weights = folder.weights if folder.weights.is_file() else folder.checkpoint
    if not weights.is_file():
        raise FileNotFoundError(
            f"Expected weights in '{folder.path}'. Received: none, because the run has "
            "not saved any yet. Train first."
        )
    model = building.build(settings)
    pack = _pack(settings)
    rows = as_rows(training, pack, model.causal_lm)
    building.compile_model(model, settings, _count(rows))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(weights)
    measured = model.evaluate(
        as_rows(validation, pack, model.causal_lm),
        batch_size=settings.training.batch_size,
        return_dict=True,
        verbose=0,
    )
    print(json.dumps({name: float(value) for name, value in measured.items()}))


def generate(options: Namespace) -> None:
    """Prints what a run's model makes of prompts."""
    folder = RunFolder(options.folder)
    folder.read_settings()
    if not folder.preset.is_dir():
        raise FileNotFoundError(
            f"Expected a model in '{folder.preset}'. Received: none, because the run "
            "has not ended. Go on with it: keras-ebft train."
        )
    prompts = options.prompts or [line.rstrip("\n") for line in sys.stdin]
    causal_lm = keras_hub.models.CausalLM.from_preset(str(folder.preset))
    complete = keras_ebft.evaluation.TextGenerator(
        causal_lm,
        options.max_length,
        num_samples=options.num_samples,
        temperature=options.temperature,
        batch_size=min(16, max(1, len(prompts)) * options.num_samples),
        seed=options.seed,
    )
    for prompt, completions in zip(prompts, complete(prompts)):
        for completion in completions:
            print(json.dumps({"prompt": prompt, "completion": completion}))


def report(options: Namespace) -> None:
    """Writes a page about one run or several, and prints where it is."""
    folders = [RunFolder(folder) for folder in options.folders]
    names = [folder.path.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.path) for folder in folders]
    histories, completions = {}, {}
    for name, folder in zip(names, folders):
        histories[name] = folder.read_history()
        for section in folder.read_settings().callbacks:
            path = section.given("name").get("path")
            if section.name.lower() == "completions" and path and Path(path).is_file():
                completions[name] = path
    print(keras_ebft.report(histories, options.output, completions or None))


def _pack(settings: RunSettings) -> dict[str, Any] | None:
    pack = settings.data.pack
    return None if pack is None else pack.given()


def _count(rows: Any) -> int:
    return len(rows["token_ids"]) if isinstance(rows, dict) else len(rows)
