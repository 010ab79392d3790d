"""What compiling a step costs: how often Python is traced, and what stays in memory."""

import ctypes
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import byte_causal_lm, documents, llama, value_and_gradients
from keras import ops

import keras_ebft
from keras_ebft.backend import runtime
from keras_ebft.backend.gradients import differentiable
from keras_ebft.backend.process_memory import return_freed_memory

BACKEND = keras.backend.backend()
MIB = 2**20


class Traced:
    """x -> factor * x^2 with a gradient written out; counts its Python calls."""

    def __init__(self):
        self.forward_calls = self.backward_calls = 0

    def forward(self, factor, x):
        self.forward_calls += 1
        return factor * x * x, x

    def backward(self, factor, tensors, outputs, upstream):
        self.backward_calls += 1
        return (2.0 * factor * outputs[1] * upstream,)

    def __call__(self, factor, x):
        # Bound methods are equal, though each is an object of its own.
        return differentiable(self.forward, self.backward, factor, (x,), 1)


@pytest.fixture
def traced():
    return Traced()


def test_the_gradient_that_is_written_out(traced):
    variable = keras.Variable(np.float32([1.0, -2.0, 3.0]))

    def value():
        return ops.sum(traced(3.0, traced(0.5, ops.convert_to_tensor(variable))))

    found, (gradient,) = value_and_gradients(value, [variable])
    # 3 (x^2 / 2)^2, whose derivative is 3 x^3.
    np.testing.assert_allclose(found, 0.75 * (1 + 16 + 81), rtol=1e-6)
    np.testing.assert_allclose(gradient, [3.0, -24.0, 81.0], rtol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch runs op by op")
def test_equal_calls_are_traced_once(traced):
    variable = keras.Variable(np.float32([1.0, 2.0]))

    def value():
        x = ops.convert_to_tensor(variable)
        for _ in range(4):
            x = traced(1.0, x)
        return ops.sum(x)

    value_and_gradients(value, [variable])
    # With and without what the gradient needs are two functions on JAX.
    assert traced.forward_calls <= 2
    assert traced.backward_calls == 1


@pytest.mark.parametrize("change", ("options", "shape", "dtype"))
def test_other_calls_are_not_mistaken_for_equal(traced, change):
    x = np.float32([1.0, 2.0])
    factor, other = {
        "options": (5.0, x),
        "shape": (2.0, x[:1]),
        "dtype": (2.0, x.astype("float16")),
    }[change]
    traced(2.0, ops.convert_to_tensor(x))
    found = traced(factor, ops.convert_to_tensor(other))
    assert keras.backend.standardize_dtype(found.dtype) == other.dtype.name
    np.testing.assert_allclose(found, factor * other**2, rtol=1e-6)


def test_many_shapes_are_no_reason_to_warn(traced, caplog):
    for size in range(1, 12):
        traced(7.0, ops.ones((size,)))
    assert "retracing" not in caplog.text


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch traces nothing")
def test_every_step_is_traced_once():
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=4, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    # With a tokenizer, which is a layer that is never built.
    model = keras_ebft.EBFTModel(byte_causal_lm(), sampler, network, seed=0)
    calls, call = [], model.call
    model.call = lambda *data, **options: calls.append(1) or call(*data, **options)
    model.compile("adam")
    x = documents(4, 12)
    # What is measured before training is not traced again after it.
    for _ in range(2):
        model.evaluate(x, batch_size=2, verbose=0)
        model.fit(x, batch_size=2, verbose=0)
        assert len(calls) == 2


def test_batches_may_change_their_shape():
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile("sgd")
    calls, call = [], model.call
    model.call = lambda *data, **options: calls.append(1) or call(*data, **options)
    measured = []
    for count, length in ((2, 12), (3, 9), (2, 12)):
        x = documents(count, length)
        measured.append(model.evaluate(x, verbose=0, return_dict=True)["ce_loss"])
        assert model.fit(x, verbose=0).history["ce_loss"][0] == pytest.approx(
            measured[-1], rel=1e-5
        )
    assert measured[2] < measured[0]
    # The last shape is known.
    assert BACKEND == "torch" or len(calls) == 4


in_graphs = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's graphs")


@in_graphs
def test_deep_networks_are_looked_into_as_graphs(monkeypatch):
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=4, context_length=4, num_samples=2
    )

    def verify(*_):
        raise KeyError("no such task")

    rewards = keras_ebft.VerifierReward(verify, decode=False)
    model = keras_ebft.EBFTModel(
        llama(num_layers=1), sampler, feature_network=None, reward=rewards, seed=0
    )
    x = documents(2, 12)
    expected = model.rollout(x, seed=1)
    scores = model.score(x, expected)
    monkeypatch.setattr(runtime, "MANY_VARIABLES", 1)
    found = model.rollout(x, seed=1)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)
    for name, value in model.score(x, expected).items():
        np.testing.assert_allclose(value, scores[name], atol=1e-5)
    # What Python code raises comes out as it was raised.
    with pytest.raises(KeyError, match="no such task"):
        model.rewards(x, expected)


@in_graphs
def test_graphs_are_traced_once_per_shape_and_variables(monkeypatch):
    monkeypatch.setattr(runtime, "MANY_VARIABLES", 2)
    calls, read = [], [keras.Variable(2.0)]

    def function(x):
        calls.append(1)
        return x * sum(variable.value for variable in read)

    run = runtime.compiled(function, lambda: list(read))
    # One variable is not worth a graph.
    assert [float(run(ops.ones(()))) for _ in range(2)] == [2.0, 2.0]
    assert len(calls) == 2
    read.append(keras.Variable(3.0))
    assert [float(run(ops.ones(()))) for _ in range(2)] == [5.0, 5.0]
    read[1].assign(4.0)
    assert float(run(ops.ones(()))) == 6.0
    assert len(calls) == 3
    assert run(ops.ones((2,))).shape == (2,)
    assert len(calls) == 4
    read[1] = keras.Variable(1.0)
    assert float(run(ops.ones(()))) == 3.0
    assert len(calls) == 5


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def has_malloc_trim():
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not has_malloc_trim(), reason="the C library has no malloc_trim")
def test_freed_memory_goes_back():
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    # Small parts, which glibc takes from its heap, up to one that stays in use.
    parts = [library.malloc(1000) for _ in range(200_000)]
    for part in parts:
        ctypes.memset(part, 1, 1000)
    for part in parts[:-1]:
        library.free(ctypes.c_void_p(part))
    before = resident()
    return_freed_memory()
    assert before - resident() > 100 * MIB
    library.free(ctypes.c_void_p(parts[-1]))


@in_graphs
def test_reading_batches_leaves_the_allocator_as_it_is():
    """Or every tensor of more than 128 KiB is made of pages that must be cleared.

    `tf.data.Dataset.from_generator` would see to that, for the whole process.
    """
    script = """
import ctypes, resource, sys
import numpy as np
sys.path.insert(0, "tests")
from helpers import documents, llama
import keras_ebft
model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
model.compile("sgd")
model.fit(documents(2, 12), verbose=0)
stream = keras_ebft.data.pack(list(documents(2, 12)), None, 12)
list(stream.tf_dataset(1))
malloc, free = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free"))
malloc.restype, malloc.argtypes, free.argtypes = (
    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        block = malloc(8 * 2**20)
        ctypes.memset(block, 1, 8 * 2**20)
        free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    # One by one each of the 50 blocks has 2048 pages.
    assert int(done.stdout.split()[-1]) < 10_000


def test_errors_of_python_code_reach_the_context_they_are_raised_in():
    """Two contexts in which nothing has been raised yet are equal, and not the same."""
    with runtime.collected_errors() as outer:
        with runtime.collected_errors() as inner:
            pass
        runtime.collect(KeyError("of the outer"))
    assert [str(error) for error in outer] == ["'of the outer'"]
    assert not inner
