"""Files of training: whole, finite, of the run that reads them, or refused by name."""

import errno
import os
import shutil
from collections import namedtuple

import h5py
import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft

# What is written is checked on every backend in test_saving.py.
pytestmark = pytest.mark.on_torch

LENGTH = 10
NAME = "latest.weights.h5"


def build(optimizer=None, adapters=None, seed=5):
    causal_lm = llama(num_layers=1)
    if adapters is not None:
        causal_lm.backbone.enable_lora(adapters)
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=seed)
    model.compile(optimizer or keras.optimizers.Adam(0.01))
    return model


def fit(model, path, epochs=2, data=0, strict=True, callbacks=(), **options):
    options = {"batch_size": 2, **options}
    settings = {} if strict else {"strict": False}
    checkpoint = keras_ebft.TrainingCheckpoint(path, **settings)
    return model.fit(
        documents(4, LENGTH, seed=data),
        epochs=epochs,
        verbose=0,
        callbacks=[*callbacks, checkpoint],
        **options,
    )


def weights(model):
    return [to_numpy(variable) for variable in model.causal_lm.variables]


def same(first, second):
    return all((one == other).all() for one, other in zip(first, second, strict=True))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder after two epochs."""
    folder = tmp_path_factory.mktemp("written")
    fit(build(), folder / NAME)
    return folder


@pytest.fixture
def path(written, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / NAME


def test_the_file_before_is_kept(path):
    assert files(path.parent) == [NAME, f"previous-{NAME}"]
    os.replace(path.with_name(f"previous-{NAME}"), path)
    assert fit(build(), path).epoch == [1]


def test_a_finished_run_says_so(path, caplog):
    assert fit(build(), path).history == {}
    assert "finished after 2 epochs" in caplog.text
    caplog.clear()
    assert fit(build(), path, epochs=3).epoch == [2]
    assert not caplog.records


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_is_refused(path, share):
    with open(path, "r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    model = build()
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{NAME}.*damaged.*previous-{NAME}"):
        fit(model, path)
    assert same(before, weights(model))


def contents(path):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and name != "run_record":
            found[name] = item[()].tobytes()

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def test_a_byte_that_was_changed_is_noticed(path):
    from keras_ebft.training import checkpoint_files

    whole, expected = path.read_bytes(), contents(path)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0x10
        path.write_bytes(spoiled)
        try:
            checkpoint_files.read_record(path)
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
        else:
            # It stands where nothing is read.
            assert contents(path) == expected
    assert refused > 10


OTHERS = {
    "optimizer": ({"optimizer": keras.optimizers.SGD(0.01)}, {}, "class_name.*SGD"),
    "setting": ({"optimizer": keras.optimizers.Adam(0.01, 0.5)}, {}, "beta_1 was 0.9"),
    "adapters": ({"adapters": 2}, {}, r"adapters was \[\]"),
    "seed": ({"seed": 6}, {}, "data order seed was 5 and is 6"),
    "data": ({}, {"data": 1}, "data checksum"),
    "batch size": ({}, {"batch_size": 4}, "data batch shape token_ids was"),
    "order": ({}, {"shuffle": False}, "shuffle was true and is false"),
    "steps": ({}, {"steps_per_epoch": 1}, "steps_per_epoch was null and is 1"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_name(path, name):
    build_options, fit_options, message = OTHERS[name]
    model = build(**build_options)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{NAME}.*{message}.*strict=False"):
        fit(model, path, **fit_options)
    assert same(before, weights(model))


def test_another_run_is_resumed_where_asked_to(path, caplog):
    history = fit(build(), path, epochs=3, data=1, strict=False)
    assert history.epoch == [2]
    assert "as another run: data checksum" in caplog.text
    with pytest.raises(TypeError, match="strict"):
        keras_ebft.TrainingCheckpoint(path, strict="no")


def test_other_versions_are_told(path, caplog, monkeypatch):
    monkeypatch.setattr("keras_ebft.training.checkpoints.__version__", "99")
    assert fit(build(), path, epochs=3).epoch == [2]
    assert "versions keras_ebft was" in caplog.text


def test_a_learning_rate_is_that_of_the_file(path):
    model = build(keras.optimizers.Adam(0.5))
    fit(model, path)
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.01)


def test_two_runs_at_one_path(path):
    def other(epoch, logs):
        fit(build(), path, epochs=4)

    intruder = keras.callbacks.LambdaCallback(on_epoch_begin=other)
    with pytest.raises(ValueError, match=rf"{NAME}.*this run alone.*path of its own"):
        fit(build(), path, epochs=3, callbacks=[intruder])
    assert fit(build(), path, epochs=5).epoch == [4]


def test_a_full_disk(path, monkeypatch):
    usage = namedtuple("usage", "free")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(OSError, match=rf"free bytes.*1000.*{NAME}") as caught:
            fit(build(), path, epochs=3)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert fit(build(), path, epochs=3).epoch == [2]


def test_writing_that_fails_leaves_nothing(path, monkeypatch):
    def fail(self, partial, **_):
        partial.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "disk full")

    before = files(path.parent), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(keras_ebft.EBFTModel, "save_weights", fail)
        with pytest.raises(OSError, match="disk full"):
            fit(build(), path, epochs=3)
    assert (files(path.parent), path.read_bytes()) == before
    assert fit(build(), path, epochs=3).epoch == [2]


def test_files_are_on_disk_before_they_replace_others(path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("flush"))
    replace = os.replace

    def recorded(source, target):
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", recorded)
    fit(build(), path, epochs=3)
    # The folder, too: it holds the names.
    assert calls == [
        *("flush", f"previous-{NAME}", "flush"),
        *("flush", NAME, "flush"),
    ]


def test_what_killed_processes_left_is_removed(path):
    stale, fresh = (path.with_name(f"partial-{name}-{NAME}") for name in ("a", "b"))
    for partial in (stale, fresh):
        partial.write_bytes(b"half a file")
    os.utime(stale, (0, 0))
    fit(build(), path)
    assert not stale.exists()
    assert fresh.exists()


def test_weights_that_are_not_finite_are_not_written(path, tmp_path):
    model = build()
    before = path.read_bytes()

    def spoil(epoch, logs):
        weight = model.trainable_variables[0]
        weight.assign(weight * np.nan)

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=spoil)]
    with pytest.raises(FloatingPointError, match=r"weights\.h5.*NaN.*embeddings"):
        fit(model, path, epochs=3, callbacks=callbacks)
    assert path.read_bytes() == before
    found = files(tmp_path)
    others = {
        "model.keras": model.save,
        "model.weights.h5": model.save_weights,
        "folder": lambda p: keras_ebft.export_to_hugging_face(model.causal_lm, p),
    }
    for name, write in others.items():
        with pytest.raises(FloatingPointError, match=name):
            write(tmp_path / name)
    assert files(tmp_path) == found


@pytest.mark.parametrize("adapters", [None, 2])
def test_weights_in_several_files_are_the_same(adapters, tmp_path):
    model = build(adapters=adapters)
    model.train_on_batch(documents(2, LENGTH))
    path = tmp_path / "model.weights.json"
    model.save_weights(path, max_shard_size=4e-6)
    assert len(files(tmp_path)) > 3
    loaded = build(adapters=adapters)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(path)
    values = [
        [
            to_numpy(variable)
            for variable in (*one.written_variables(), *one._saved_variables().values())
        ]
        for one in (model, loaded)
    ]
    assert same(*values)


class Orbax(keras.callbacks.OrbaxCheckpoint):
    """Made without the package it is for."""

    def __init__(self):
        keras.callbacks.Callback.__init__(self)


def test_orbax_is_refused_by_name(tmp_path):
    for callbacks in ([Orbax()], [keras.callbacks.CallbackList([Orbax()])]):
        with pytest.raises(ValueError, match=r"OrbaxCheckpoint.*TrainingCheckpoint"):
            fit(build(), tmp_path / NAME, callbacks=callbacks)
