"""Several devices: refused where training would be silently wrong."""

import types

import keras
import pytest
from helpers import documents, llama

import keras_ebft
from keras_ebft.backend import distribution

BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND != "jax", reason="Keras distributes on JAX alone")
@pytest.mark.parametrize("way", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_a_batch_that_devices_do_not_divide_is_refused(way, monkeypatch):
    """Before anything is computed, so that the weights are still there."""
    two = types.SimpleNamespace(
        device_mesh=types.SimpleNamespace(axis_names=["batch"], shape=(2,)),
        batch_dim_name="batch",
    )
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile("sgd")
    monkeypatch.setattr(keras.distribution, "distribution", lambda: two)
    options = {"verbose": 0} if "batch" not in way else {}
    with pytest.raises(
        ValueError, match=r"2 devices.*batches of 3 rows.*multiple of 2"
    ):
        getattr(model, way)(documents(3, 8), **options)
    distribution.check_batch_divides(4)
    monkeypatch.undo()
    assert all(w is not None for w in model.causal_lm.get_weights())


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
