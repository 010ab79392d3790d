"""What the progress bar shows: a line, of what says how training goes."""

import re

import keras
import pytest
from helpers import documents, llama

import keras_ebft

# Keras' own progress bar, with other names.
pytestmark = pytest.mark.on_torch

X = documents(4, 14)


@pytest.fixture(scope="module")
def model():
    sampler = keras_ebft.BlockSampler(rollout_length=3, stride=4, num_samples=2)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    return model


def shown(text):
    """Names in a progress bar, and the longest of its lines."""
    text = re.sub(r"\x1b\[\d+m", "", text)
    lines = re.split(r"[\n\r\x08]+", text)
    names = {name for line in lines for name in re.findall(r"- ([\w@]+): ", line)}
    return names, max(map(len, lines))


SHORT = {"feature_matching_loss", "reward", "ce_loss"}
# Of training.
SPEED = {"tokens_per_second"}


def test_a_line_of_few_metrics(model, capsys):
    measure = keras_ebft.callbacks.Measure(lambda _: {"chrf": 3.0})
    history = model.fit(
        X, batch_size=2, validation_data=X, callbacks=measure, verbose=1
    ).history
    names, longest = shown(capsys.readouterr().out)
    assert names == SHORT | SPEED | {f"val_{name}" for name in SHORT} | {"val_chrf"}
    # What differs from run to run is in no history that was not asked for it.
    assert not SPEED & set(history)
    assert {"alignment", "val_alignment", "loss", "policy_loss"} < set(history)
    assert longest < 240


@pytest.mark.parametrize("progress", ["short", "full"])
def test_evaluate_and_fit_show_what_was_asked_for(model, capsys, progress):
    values = model.evaluate(X, progress=progress, verbose=1, return_dict=True)
    names, _ = shown(capsys.readouterr().out)
    assert names == (SHORT if progress == "short" else set(values))
    history = model.fit(X, progress=progress, verbose=2).history
    names, _ = shown(capsys.readouterr().out)
    assert names == (SHORT | SPEED if progress == "short" else set(history))


def test_supervised_training_shows_its_cross_entropy(capsys):
    sft = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    sft.compile(keras.optimizers.SGD(0.0))
    sft.fit(X, verbose=2)
    assert shown(capsys.readouterr().out)[0] == {"ce_loss"} | SPEED


def test_silence_and_a_bar_of_ones_own(model, capsys):
    model.fit(X, verbose=0)
    assert capsys.readouterr().out == ""
    model.fit(X, verbose=2, callbacks=[keras.callbacks.ProgbarLogger()])
    assert "alignment" in shown(capsys.readouterr().out)[0]


def test_other_words_are_refused_before_training(model):
    with pytest.raises(ValueError, match=r"progress.*short.*full.*long"):
        model.fit(X, progress="long")
    with pytest.raises(ValueError, match=r"progress.*short.*full.*long"):
        model.evaluate(X, progress="long")


def test_skipped_updates_show_once_there_are_some(capsys):
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile(keras.optimizers.SGD(float("nan")))
    with pytest.raises(FloatingPointError):
        model.fit(X, batch_size=1, epochs=99, verbose=1)
    assert shown(capsys.readouterr().out)[0] == {"ce_loss", "skipped_updates"} | SPEED
