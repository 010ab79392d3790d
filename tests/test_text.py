"""Text in, text out: `generate` around training, and no TensorFlow where not asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from helpers import byte_causal_lm, flat, set_random_seed

import keras_ebft

BACKEND = keras.backend.backend()
TEXTS = ["def f(x): return", "abab abab abab"]
SAMPLER = keras_ebft.BlockSampler(rollout_length=2, stride=5, context_length=4)


class Writing(keras.callbacks.Callback):
    """Generates wherever training can be interrupted, not by way of `self.model`."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm
        self.texts = []

    def write(self):
        self.texts.append(self.causal_lm.generate("abab", max_length=10))

    def on_train_batch_begin(self, batch, logs=None):
        self.write()

    def on_train_batch_end(self, batch, logs=None):
        self.write()

    def on_test_batch_end(self, batch, logs=None):
        self.write()

    def on_epoch_end(self, epoch, logs=None):
        self.write()


class Weights(Writing):
    """The weights wherever the other callback generates."""

    def write(self):
        self.texts.append(self.model.causal_lm.get_weights())


def trained(callback, sampler="greedy"):
    set_random_seed(0)
    causal_lm = byte_causal_lm()
    causal_lm.compile(sampler=sampler)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(causal_lm, SAMPLER, network, seed=0)
    model.compile(keras.optimizers.SGD(20.0))
    called = callback(causal_lm)
    called.write() if callback is Writing else None
    model.fit(
        TEXTS,
        batch_size=1,
        epochs=2,
        verbose=0,
        validation_data=TEXTS,
        callbacks=[called],
    )
    return causal_lm, called.texts


@pytest.fixture(scope="module")
def plain():
    """Trained without writing, and the weights on the way."""
    return trained(Weights)


@pytest.fixture(scope="module")
def wrote():
    """Trained the same, and the texts on the way."""
    return trained(Writing)


@pytest.mark.slow
@pytest.mark.compiled
def test_generating_while_training_changes_nothing(plain, wrote):
    assert len(wrote[1]) == 1 + 2 * (2 + 2 + 2 + 1)
    for one, other in zip(plain[0].get_weights(), wrote[0].get_weights()):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_drawing_while_training_changes_nothing(plain):
    causal_lm, _ = trained(Writing, sampler="top_k")
    for one, other in zip(plain[0].get_weights(), causal_lm.get_weights()):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.compiled
def test_text_written_while_training_comes_from_the_weights_of_that_moment(
    plain, wrote
):
    texts = wrote[1]
    assert wrote[0].generate("abab", max_length=10) == texts[-1]
    twin = byte_causal_lm()
    twin.compile(sampler="greedy")
    for now, text in zip(plain[1], texts[1:], strict=True):
        twin.set_weights(now)
        assert twin.generate("abab", max_length=10) == text
    # Otherwise any weights would have done.
    assert len(set(texts)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["keras_hub", "hugging_face"])
def test_a_preset_from_a_folder_trains_and_generates(layout, byte_lm, tmp_path):
    if layout == "keras_hub":
        byte_lm.save_to_preset(str(tmp_path))
    else:
        keras_ebft.export_to_hugging_face(byte_lm, tmp_path)
    causal_lm = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    causal_lm.preprocessor.sequence_length = 24
    model = keras_ebft.EBFTModel(
        causal_lm, SAMPLER, keras_ebft.FeatureNetwork(layers=(1,)), seed=0
    )
    model.compile(keras.optimizers.SGD(0.1))
    before = flat(causal_lm.get_weights())
    model.fit(TEXTS, batch_size=2, verbose=0)
    assert (flat(causal_lm.get_weights()) != before).any()
    assert causal_lm.generate("abab", max_length=10).startswith("abab")


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(BACKEND == "tensorflow", reason="the backend itself")
def test_presets_train_and_generate_without_tensorflow(byte_lm, tmp_path):
    folders = [tmp_path / "keras_hub", tmp_path / "hugging_face"]
    byte_lm.save_to_preset(str(folders[0]))
    keras_ebft.export_to_hugging_face(byte_lm, folders[1])
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, tests / "without_tensorflow.py", *folders],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["imported"] == []
    for losses, text in found["trained"]:
        assert np.isfinite(losses).all()
        assert text.startswith("abab")
    # What KerasHub itself does with TensorFlow alone; docs/guide.md says so.
    assert set(found["refused"]) == {"Gemma3", "Gemma3n", "Gemma4", "RWKV7"}
    for name, error in found["refused"].items():
        assert name.removesuffix("7") in error
        assert "tensorflow" in error
    assert found["tokenizer"].startswith("abab")
