"""Text in, text out: `generate` around training, and no TensorFlow where not asked."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import keras_hub
import pytest
from helpers import QUICK, flat

import keras_ebft

BACKEND = keras.backend.backend()
TEXTS = ["def f(x): return", "abab abab abab"]
SAMPLER = keras_ebft.BlockSampler(rollout_length=2, stride=5, context_length=4)


def test_generate_before_during_and_after_training(byte_lm):
    written = []

    def generate(*_):
        written.append(byte_lm.generate("abab", max_length=10))

    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(byte_lm, SAMPLER, network, seed=0)
    model.compile(keras.optimizers.SGD(5.0), **QUICK)
    byte_lm.compile(sampler="greedy")
    generate()
    model.fit(
        TEXTS,
        batch_size=2,
        epochs=2,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=generate)],
    )
    generate()
    assert all(text.startswith("abab") for text in written)
    assert len(written) == 4
    # What is written is what the trained weights write, at once and not later.
    assert written[0] != written[-1]
    assert written[-2] == written[-1]


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
    model.compile(keras.optimizers.SGD(0.1), **QUICK)
    before = flat(causal_lm.get_weights())
    model.fit(TEXTS, batch_size=2, verbose=0)
    assert (flat(causal_lm.get_weights()) != before).any()
    assert causal_lm.generate("abab", max_length=10).startswith("abab")


WITHOUT_TENSORFLOW = """
import sys

# Importing a module that is None raises, and so does whatever needs it.
sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
import keras, keras_ebft
from helpers import byte_causal_lm
from test_text import SAMPLER, TEXTS

model = keras_ebft.EBFTModel(
    byte_causal_lm(), SAMPLER, keras_ebft.FeatureNetwork(layers=(1,)), seed=0
)
model.compile(keras.optimizers.SGD(0.1))
model.fit(TEXTS, batch_size=2, verbose=0)
print(model.causal_lm.generate("abab", max_length=10))
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "tensorflow", reason="the backend itself")
def test_strings_need_no_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("abab")
