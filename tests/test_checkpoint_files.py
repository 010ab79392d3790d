"""Files of training: whole, finite, of the run that reads them, or refused by name."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import sys
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


def build(optimizer=None, adapters=None, seed=5, **options):
    causal_lm = llama(num_layers=1)
    if adapters is not None:
        causal_lm.backbone.enable_lora(adapters)
    options = options or {"policy_weight": 0.0, "ce_weight": 1.0}
    model = keras_ebft.EBFTModel(causal_lm, seed=seed, **options)
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


@pytest.mark.parametrize("name", ["embedding", "layer"])
def test_other_layers_frozen_are_another_run(name, tmp_path):
    """Its optimizer would have other variables, and begin at 0."""
    fit(build(), tmp_path / NAME, epochs=1)
    causal_lm = llama(num_layers=1)
    frozen = causal_lm.backbone.token_embedding
    if name == "layer":
        frozen = causal_lm.backbone.transformer_layers[0]
    frozen.trainable = False
    other = keras_ebft.EBFTModel(causal_lm, seed=5, policy_weight=0.0, ce_weight=1.0)
    other.compile(keras.optimizers.Adam(0.01))
    with pytest.raises(ValueError, match=r"frozen was \[\] and is \["):
        fit(other, tmp_path / NAME)
    assert other.optimizer.iterations == 0


def test_a_critic_made_anew_goes_on(tmp_path):
    """Keras numbers the names of optimizers that are made in one process."""

    def made(critic):
        sampler = {"rollout_length": 2, "stride": 4, "context_length": 2}
        return build(sampler=keras_ebft.BlockSampler(**sampler), critic=critic)

    fit(made(keras_ebft.Critic()), tmp_path / NAME, epochs=1)
    assert len(fit(made(keras_ebft.Critic()), tmp_path / NAME).epoch) == 1
    other = keras_ebft.Critic(optimizer=keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="critic optimizer"):
        fit(made(other), tmp_path / NAME)


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
    "weight": (
        {"policy_weight": 0.0, "ce_weight": 0.5},
        {},
        "settings ce_weight was 1.0 and is 0.5",
    ),
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


def verify(prompts, completions, targets):
    return np.zeros(np.shape(completions)[:3])


def rollouts(temperature=0.6, reward=None, **options):
    """Options of a model that learns from rollouts."""
    sampler = keras_ebft.BlockSampler(
        rollout_length=2,
        stride=4,
        context_length=2,
        num_samples=2,
        temperature=temperature,
    )
    reward = reward or keras_ebft.VerifierReward(verify, decode=False)
    return {"sampler": sampler, "reward": reward, **options}


OTHER_ROLLOUTS = {
    "temperature": (rollouts(0.7), "settings sampler temperature was 0.6 and is 0.7"),
    "advantage": (rollouts(advantage="reinforce"), 'advantage was "rloo" and is "rein'),
    "verifier": (
        rollouts(reward=keras_ebft.VerifierReward(max, decode=False)),
        r"settings reward fn was .*verify\" and is \"builtins\.max",
    ),
    "reward": (
        rollouts(reward=keras_ebft.FeatureMatchingReward()),
        'settings reward class was "VerifierReward"',
    ),
    "replayed": (
        rollouts(sampler=keras_ebft.ReplaySampler(np.ones((2, 2, 2, 2), int))),
        'settings sampler class was "BlockSampler"',
    ),
}


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory):
    """The file of an epoch on rollouts."""
    path = tmp_path_factory.mktemp("rolled_out") / NAME
    fit(build(**rollouts()), path, epochs=1)
    return path


@pytest.mark.parametrize("name", OTHER_ROLLOUTS)
def test_other_rollouts_and_rewards_are_another_run(rolled_out, name):
    options, message = OTHER_ROLLOUTS[name]
    with pytest.raises(ValueError, match=message):
        fit(build(**options), rolled_out)


def test_a_run_with_less_memory_is_the_same(rolled_out, tmp_path):
    shutil.copy(rolled_out, tmp_path / NAME)
    options = rollouts(micro_batches=2, rematerialize=True)
    assert fit(build(**options), tmp_path / NAME).epoch == [1]


def test_a_record_that_says_less_is_of_an_earlier_version(rolled_out, tmp_path):
    from keras_ebft.training import checkpoint_files

    record = checkpoint_files.read_record(rolled_out)
    assert record.pop("settings")["sampler"]["rollout_length"] == 2
    model = build(**rollouts())
    model.optimizer.build(model.trainable_variables)
    model.load_weights(rolled_out)
    checkpoint_files.write_checkpoint(model, tmp_path / NAME, record)
    assert fit(build(**rollouts(0.7)), tmp_path / NAME).epoch == [1]


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


def test_a_learning_rate_is_that_of_the_file(path, caplog):
    model = build(keras.optimizers.Adam(0.5))
    fit(model, path)
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.01)
    (said,) = (m for m in caplog.messages if "learning rate of" in m)
    assert NAME in said and "0.01" in said and "in place of 0.5" in said
    caplog.clear()
    fit(build(), path)
    assert "learning rate" not in caplog.text


def test_other_weights_that_decay_are_another_run(tmp_path):
    """Which ones, no configuration of an optimizer says."""
    path = tmp_path / NAME

    def decaying(*excluded):
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded)
        return build(optimizer)

    fit(decaying("scale"), path, epochs=1)
    assert fit(decaying("scale"), path, epochs=2).epoch == [1]
    for other in ((), ("scale", "embeddings")):
        with pytest.raises(ValueError, match="another: weight_decay"):
            fit(decaying(*other), path, epochs=3)


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


@contextlib.contextmanager
def quota(size):
    """Context in which no file may have more bytes, as where a disk is shared out."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="room is reserved on Linux")
def test_a_quota_that_is_used_up(path):
    """What no question about free space tells, and HDF5 does not survive."""
    before = files(path.parent), path.read_bytes()
    with quota(path.stat().st_size // 2):
        for _ in range(2):
            with pytest.raises(OSError, match=r"room for a file.*Make room") as caught:
                fit(build(), path, epochs=3)
            assert caught.value.errno == errno.EFBIG
            assert (files(path.parent), path.read_bytes()) == before
    assert fit(build(), path, epochs=3).epoch == [2]


@pytest.mark.parametrize("adapters", [None, 2])
def test_no_file_is_larger_than_what_is_reserved_for_it(adapters, path):
    from keras_ebft.training import checkpoint_files

    model = build(adapters=adapters)
    path.unlink()
    fit(model, path, epochs=1)
    record = checkpoint_files.read_record(path)
    size = path.stat().st_size
    assert size <= checkpoint_files.most_bytes(model, record) < 5 * size


def test_a_state_that_cannot_be_written_leaves_nothing(path, monkeypatch):
    """While HDF5 has the file open; three times, and then it can."""

    def fail(self, store):
        raise RuntimeError("no state")

    before = files(path.parent), path.read_bytes()
    state = type(build().training_state)
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_own_variables", fail)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no state"):
                fit(build(), path, epochs=3)
            gc.collect()
    assert (files(path.parent), path.read_bytes()) == before
    assert fit(build(), path, epochs=3).epoch == [2]


def test_writing_that_fails_leaves_nothing(path, monkeypatch):
    def fail(self, partial, **_):
        partial.write(b"half a file")
        raise OSError(errno.ENOSPC, "disk full")

    before = files(path.parent), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(keras_ebft.EBFTModel, "save_weights", fail)
        with pytest.raises(OSError, match="disk full"):
            fit(build(), path, epochs=3)
    assert (files(path.parent), path.read_bytes()) == before
    assert fit(build(), path, epochs=3).epoch == [2]


def test_two_writers_at_once_do_not_meet(path, monkeypatch):
    """The second begins and ends while the first is in the middle of its file."""
    from keras_ebft.training import checkpoint_files

    model, add_record = build(), checkpoint_files._add_record
    written = []

    def add(partial, record):
        if record == {"run": 1}:
            checkpoint_files.write_checkpoint(model, path, {"run": 2})
            written.append(checkpoint_files.read_record(path))
        add_record(partial, record)

    monkeypatch.setattr(checkpoint_files, "_add_record", add)
    checkpoint_files.write_checkpoint(model, path, {"run": 1})
    written.append(checkpoint_files.read_record(path))
    previous = checkpoint_files.read_record(path.with_name(f"previous-{NAME}"))
    assert [*written, previous] == [{"run": 2}, {"run": 1}, {"run": 2}]
    assert files(path.parent) == [NAME, f"previous-{NAME}"]


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
