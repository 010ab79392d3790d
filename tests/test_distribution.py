"""Several devices: refused where training would be silently wrong."""

import json

import keras
import pytest
from helpers import documents, llama

import keras_ebft
from keras_ebft.backend import distribution, runtime

BACKEND = keras.backend.backend()
FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (*FLOATS, "bool", "uint8", "int8", "int32", "int64", "uint32")


on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")


@on_tensorflow
def test_the_scope_of_a_strategy_is_refused():
    import tensorflow as tf

    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile("sgd")
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        with pytest.raises(ValueError, match=r"scope of a tf.*MirroredStrategy.*Leave"):
            keras_ebft.EBFTModel.sft(llama(num_layers=1))
        for way in (model.fit, model.evaluate, model.train_on_batch):
            with pytest.raises(ValueError, match="MirroredStrategy"):
                way(documents(2, 8))
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        distribution.refuse_silent_distribution()
    distribution.refuse_silent_distribution()


@on_tensorflow
def test_what_was_made_in_the_scope_of_a_strategy_is_refused():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        mirrored, optimizer = llama(num_layers=1), keras.optimizers.SGD(0.1)
    with pytest.raises(ValueError, match=r"a causal_lm outside .*'.*', which was made"):
        keras_ebft.EBFTModel.sft(mirrored)
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1))
    with pytest.raises(ValueError, match=r"an optimizer outside .*', which was"):
        model.compile(optimizer)


@on_tensorflow
def test_processes_of_tensorflow_that_would_not_train_together_are_refused(
    monkeypatch,
):
    from keras_ebft.backend import tensorflow_processes

    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "evaluator": ["d:1"]}
    task = {"type": "worker", "index": 0}
    config = json.dumps({"cluster": cluster, "task": task})
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=r"one of 3 processes.*before anything else"):
        distribution.refuse_silent_distribution()
    monkeypatch.setattr(
        tensorflow_processes, "tasks_of_cluster", lambda: [("chief", 0), ("worker", 0)]
    )
    distribution.refuse_silent_distribution()
    monkeypatch.setattr(tensorflow_processes, "accelerators_of_process", lambda: 2)
    with pytest.raises(ValueError, match=r"2 accelerators.*CUDA_VISIBLE_DEVICES"):
        distribution.refuse_silent_distribution()


@on_tensorflow
def test_processes_of_tensorflow_are_not_compiled_with_xla():
    assert not runtime.resolve_jit_compile("auto", processes=2)
    with pytest.raises(ValueError, match=r"jit_compile=True"):
        runtime.resolve_jit_compile(True, processes=2)


@on_tensorflow
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_processes_send_keeps_its_bits(dtype):
    import tensorflow as tf

    from keras_ebft.backend import tensorflow_processes

    values = tf.cast(tf.constant([[0.0, 1.0, 100.0], [0.0, 3.0, 117.0]]), dtype)
    if values.dtype.is_floating:
        values *= tf.cast(tf.constant([[-1.0, -1.0, float("nan")]]), dtype)
    words = tensorflow_processes._as_words(values)
    assert words.dtype == tf.int32
    assert words.shape.rank == 1
    found = tensorflow_processes._from_words(words, values)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert found.numpy().tobytes() == values.numpy().tobytes()


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
