"""Several devices: refused where training would be silently wrong."""

import keras
import pytest
from helpers import documents, llama

import keras_ebft
from keras_ebft.backend import distribution

BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_the_scope_of_a_strategy_is_refused():
    import tensorflow as tf

    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile("sgd")
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        with pytest.raises(ValueError, match=r"scope of a tf.*MirroredStrategy"):
            keras_ebft.EBFTModel.sft(llama(num_layers=1))
        for way in (model.fit, model.evaluate, model.train_on_batch):
            with pytest.raises(ValueError, match="MirroredStrategy"):
                way(documents(2, 8))
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        distribution.refuse_silent_distribution()
    distribution.refuse_silent_distribution()


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
def test_several_processes_of_jax_that_would_not_train_together_are_refused(
    monkeypatch,
):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes without a keras\.distrib"):
        distribution.refuse_silent_distribution()
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    layout = keras.distribution.LayoutMap(mesh)
    parts = keras.distribution.ModelParallel(layout_map=layout)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: parts)
    with pytest.raises(ValueError, match="a ModelParallel over 2 processes"):
        distribution.refuse_silent_distribution()
