"""Saving, loading and going on after an interruption."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import documents, llama, set_random_seed, to_numpy
from text_models import text_model

import keras_ebft
from keras_ebft.networks import adapters

LENGTH = 14


def build(adapted=False, seed=5):
    causal_lm = llama(num_layers=1)
    if adapted:
        set_random_seed(0)
        causal_lm.backbone.enable_lora(2)
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(
            rollout_length=3, stride=4, context_length=4, num_samples=2
        ),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=seed,
    )
    model.compile(keras.optimizers.Adam(0.01))
    return model


def fit(model, epochs=1, **options):
    return model.fit(
        documents(5, LENGTH), batch_size=2, epochs=epochs, verbose=0, **options
    )


def state(model):
    """Everything that decides how training goes on."""
    variables = [
        *model.variables,
        *model.optimizer.variables,
        *model._saved_variables().values(),
    ]
    return [to_numpy(variable) for variable in variables]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one, other)


class Interruption(keras.callbacks.Callback):
    """Ends training after a number of batches: by an exception, or for good."""

    def __init__(self, batches, kill=False):
        super().__init__()
        self.batches = batches
        self.kill = kill

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if self.batches:
            return
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise InterruptedError


def checkpoint(kind, folder):
    if kind == "ours":
        path = folder / "ours" / "latest.weights.h5"
        return keras_ebft.TrainingCheckpoint(path, save_freq=2)
    return keras.callbacks.BackupAndRestore(
        folder / str(kind), save_freq=kind, delete_checkpoint=False
    )


class Runs:
    """A run of three epochs of three batches, and one interrupted in the second."""

    def __init__(self, adapted, folder):
        self.adapted = adapted
        self.folder = folder
        self.model = build(adapted)
        whole = checkpoint("ours", folder / "whole")
        self.history = fit(self.model, epochs=3, callbacks=whole).history
        self.end = state(self.model)
        # The last checkpoints by batches are one batch old.
        kept = [checkpoint(kind, folder) for kind in ("ours", 2, "epoch")]
        with pytest.raises(InterruptedError):
            fit(build(adapted), epochs=3, callbacks=[*kept, Interruption(6)])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="plain"),
        pytest.param(True, id="adapters", marks=pytest.mark.slow),
    ],
)
def runs(request, tmp_path_factory):
    return Runs(request.param, tmp_path_factory.mktemp("runs"))


KINDS = ["ours", 2, pytest.param("epoch", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_training_ends_with_the_same_weights(runs, kind):
    resumed = build(runs.adapted)
    batches = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(batch)
    )
    callbacks = [checkpoint(kind, runs.folder), count]
    history = fit(resumed, epochs=3, callbacks=callbacks).history
    assert batches == [0, 1, 2] * 2
    assert_same(runs.end, state(resumed))
    # The means of the interrupted epoch are those of the whole epoch.
    for name, values in history.items():
        np.testing.assert_array_equal(values, runs.history[name][1:], err_msg=name)
    # Another fit starts from its own first epoch.
    assert fit(resumed).epoch == [0]


def test_a_finished_run_trains_no_more(runs):
    model = build(runs.adapted)
    callbacks = checkpoint("ours", runs.folder / "whole")
    assert fit(model, epochs=3, callbacks=callbacks).history == {}
    assert_same(runs.end, state(model))


def test_a_saved_model_loads_and_goes_on_alike(runs, tmp_path):
    path = tmp_path / "model.keras"
    runs.model.save(path)
    loaded = keras.saving.load_model(path)
    assert_same(state(runs.model), state(loaded))
    assert len(loaded.trainable_variables) == len(runs.model.trainable_variables)
    assert loaded.jit_compile == runs.model.jit_compile
    x = documents(2, LENGTH)
    for model in (runs.model, loaded):
        model.train_on_batch(x)
    assert_same(state(runs.model), state(loaded))
    assert any((a != b).any() for a, b in zip(runs.end, state(loaded)))


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_frozen_stays_frozen(adapted, tmp_path):
    """The optimizer, too, goes on: it has slots for what is trained alone."""
    causal_lm = llama(num_layers=2)
    if adapted:
        causal_lm.backbone.enable_lora(2)
    causal_lm.backbone.transformer_layers[0].trainable = False
    causal_lm.backbone.token_embedding.trainable = False
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.Adam(0.01))
    model.fit(documents(4, 12), batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    names, found = (
        [v.path.split("/", 1)[1] for v in m.causal_lm.trainable_variables]
        for m in (model, loaded)
    )
    assert found == names
    assert 0 < len(names) < len(llama(num_layers=2).trainable_variables)
    before = to_numpy(loaded.causal_lm.backbone.token_embedding.embeddings)
    for one in (model, loaded):
        one.fit(documents(4, 12), batch_size=2, verbose=0)
        assert int(to_numpy(one.optimizer.iterations)) == 4
    for one, other in zip(model.causal_lm.variables, loaded.causal_lm.variables):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other), err_msg=one.path)
    after = to_numpy(loaded.causal_lm.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(before, after)


def code(path):
    """Python code that leaves a trace, as Keras writes it to files."""
    path = str(path)
    with pytest.warns(UserWarning, match="lambda"):
        return keras.saving.serialize_keras_object(lambda *_: open(path, "w").close())


def plant(path, place, value):
    """Replaces an entry in the configuration of a saved model."""
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    config = json.loads(contents["config.json"])
    entry = config
    for key in place[:-1]:
        entry = entry[key]
    assert place[-1] in entry
    entry[place[-1]] = value
    contents["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)


PLACES = {
    "reward": ("config", "reward"),
    "sampler": ("config", "sampler"),
    "network": ("config", "feature_network", "config", "network"),
    "weight": ("config", "ce_weight"),
    "backbone": ("config", "causal_lm", "config", "backbone"),
    "optimizer": ("compile_config", "optimizer"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["lambda", "Lambda", "function"])
def test_loading_refuses_code_and_does_not_run_it(kind, place, tmp_path):
    path, trace = tmp_path / "model.keras", tmp_path / "trace"
    build().save(path)
    planted = {
        "lambda": code(trace),
        "Lambda": {
            "module": "keras.layers",
            "class_name": "Lambda",
            "config": {"name": "planted", "function": code(trace)},
            "registered_name": None,
        },
        "function": {
            "module": "os",
            "class_name": "function",
            "config": "system",
            "registered_name": "system",
        },
    }
    plant(path, PLACES[place], planted[kind])
    with pytest.raises((TypeError, ValueError), match=r"lambda|Could not locate"):
        keras.saving.load_model(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")
def test_code_of_ones_own_is_loaded_where_asked_to(tmp_path):
    """Without safe mode, what is refused above is there and runs."""
    path, trace = tmp_path / "model.keras", tmp_path / "trace"
    model = build()
    model.save(path)
    reward = keras_ebft.VerifierReward(len, decode=False)
    config = keras.saving.serialize_keras_object(reward)
    config["config"]["fn"] = code(trace)
    plant(path, ("config", "reward"), config)
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(path)
    loaded = keras.saving.load_model(path, safe_mode=False)
    assert not trace.exists()
    loaded.reward.fn(None, None, None)
    assert trace.exists()


def test_weights_of_other_adapters_are_refused():
    file = {}
    build(adapted=True).training_state.save_own_variables(file)
    with pytest.raises(ValueError, match=r"2 adapted layers.*with 0.*enable_lora"):
        build().training_state.load_own_variables(file)


def test_weights_of_another_alpha_are_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = build(adapted=True)
    model.save_weights(path)
    build(adapted=True).load_weights(path)
    other = build(adapted=True)
    for layer in adapters.adapted_layers(other.causal_lm.backbone):
        layer.lora_alpha = 5
    with pytest.raises(ValueError, match=r"file of alpha 2 .*model of 5.*enable_lora"):
        other.load_weights(path)
    file, before = {}, state(other)
    model.training_state.save_own_variables(file)
    with pytest.raises(ValueError, match="alpha 2"):
        other.training_state.load_own_variables(file)
    assert_same(state(other), before)
    # Files of before do not say it.
    del file["alpha"]
    other.training_state.load_own_variables(file)


def test_a_loaded_model_stops_where_the_saved_one_does(tmp_path):
    """While a file is read, models are made before their tokenizers are filled."""
    sampler = keras_ebft.BlockSampler(rollout_length=6, anchors="answer_start")
    model = keras_ebft.EBFTModel(text_model("GPT2"), sampler, seed=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    (end,) = model._step.stop_token_ids
    assert loaded._step.stop_token_ids == (end,)
    token_ids = np.full((1, 1, 1, 6), 20)
    token_ids[..., 2] = end
    x = {
        "token_ids": np.full((1, 16), 20),
        "answer_mask": np.arange(16)[None] >= 8,
    }
    assert (to_numpy(loaded.rollout(x, seed=1)["mask"]).shape) == (1, 4, 1, 6)
    counted = {
        name: float(to_numpy(one.loss_terms(x, np.repeat(token_ids, 4, 1))["entropy"]))
        for name, one in {"saved": model, "loaded": loaded}.items()
    }
    assert counted["saved"] == pytest.approx(counted["loaded"], rel=1e-6)


def test_checkpoint_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"end in '\.weights\.h5'.*model\.h5"):
        keras_ebft.TrainingCheckpoint(tmp_path / "model.h5")
    for wrong in ("batch", np.array([])):
        with pytest.raises(TypeError, match="save_freq"):
            keras_ebft.TrainingCheckpoint("x.weights.h5", save_freq=wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapted",
    [
        pytest.param(False, id="plain", marks=pytest.mark.compiled),
        pytest.param(True, id="adapters"),
    ],
)
def test_a_killed_process_resumes(adapted, tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "parts"), "6"]
    command += ["adapters"] if adapted else []
    done = subprocess.run(command, cwd=Path(__file__).parent, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "parts" / "end.npz").exists()
    # Processes of their own would import for longer than they train.
    for name in ("whole", "parts"):
        main(tmp_path / name, 0, adapted)
    whole, parts = (np.load(tmp_path / name / "end.npz") for name in ("whole", "parts"))
    with whole, parts:
        assert_same(list(whole.values()), list(parts.values()))


def main(folder, batches, adapted):
    model = build(adapted)
    callbacks = [checkpoint("ours", Path(folder))]
    if batches:
        callbacks.append(Interruption(batches, kill=True))
    fit(model, epochs=3, callbacks=callbacks)
    np.savez(Path(folder) / "end.npz", *state(model))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "adapters" in sys.argv[3:])
