"""Updates of large weights: those of Keras, in buckets, whole or not at all."""

import os
import signal

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

from keras_ebft.backend import large_updates, updates

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX chooses between states: updates.py"
)
SHAPES = ((3, 4), (), (5,), (2, 3, 2))
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.1, amsgrad=True, clipnorm=0.5),
    "adamw": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5),
        weight_decay=0.3,
        global_clipnorm=1.0,
    ),
    "adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "lion": lambda: keras.optimizers.Lion(0.1, weight_decay=0.1),
    "muon": lambda: keras.optimizers.Muon(0.1),
}


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    """Scalars alone are small, and a bucket holds one or two of the weights."""
    monkeypatch.setattr(updates, "SMALL", 1)
    monkeypatch.setattr(large_updates, "BUCKET", 16)


@pytest.fixture
def rehearsed(monkeypatch):
    monkeypatch.setattr(updates, "lacks_memory", lambda variables: True)


@pytest.fixture
def interruptible():
    """As where a user can interrupt: what runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["rehearsed", "copied"])
def either_way(request):
    if request.param == "rehearsed":
        request.getfixturevalue("rehearsed")


def weights():
    random = np.random.default_rng(0)
    return [
        keras.Variable(random.normal(size=shape), dtype="float32") for shape in SHAPES
    ]


def gradients(seed):
    random = np.random.default_rng(seed)
    found = [random.normal(size=shape).astype("float32") for shape in SHAPES]
    return list(map(keras.ops.convert_to_tensor, found))


def built(make):
    variables, optimizer = weights(), make()
    optimizer.build(variables)
    return variables, optimizer


def values(variables, optimizer):
    return [to_numpy(v) for v in (*variables, *optimizer.variables)]


def same(first, second):
    return all(map(np.array_equal, first, second))


def apply_if_finite(optimizer, found, variables):
    with large_updates.replaced(
        optimizer, apply=updates._apply_if_finite(optimizer, norms := [])
    ):
        optimizer.apply(found, variables)
    return norms


def spoil(found, place):
    """A gradient that is finite and whose square is not."""
    found = list(found)
    found[place] = found[place] + 1e25
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_keras(either_way, name):
    expected = built(OPTIMIZERS[name])
    found = built(OPTIMIZERS[name])
    assert large_updates.updates_in_steps(found[1], found[0])
    before = values(*found)
    for step in range(3):
        expected[1].apply(gradients(step), expected[0])
        apply_if_finite(found[1], gradients(step), found[0])
    assert not same(before, values(*found))
    for one, other in zip(values(*found), values(*expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert int(to_numpy(found[1].iterations)) == 3


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nothing_is_left_of_an_update_that_is_not_finite(either_way, name, place):
    variables, optimizer = built(OPTIMIZERS[name])
    apply_if_finite(optimizer, gradients(0), variables)
    before = values(variables, optimizer)
    found = spoil(gradients(1), place)
    if name == "sgd":
        optimizer.learning_rate = 1e30
    else:
        # Or it would be made small before it is squared.
        optimizer.global_clipnorm = None
    apply_if_finite(optimizer, found, variables)
    after = values(variables, optimizer)
    if name == "sgd":
        # The rate that was set here.
        before = [value for value in before if value != pytest.approx(0.1)]
        after = [value for value in after if value != pytest.approx(1e30)]
    assert same(before, after)


def otherwise(kind):
    """Optimizers that change more than `update_step` does: copies are kept for them."""
    if kind == "ema":
        return keras.optimizers.Adam(0.1, use_ema=True, ema_overwrite_frequency=2)
    if kind == "accumulation":
        return keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), 8.0)


@pytest.mark.parametrize("kind", ["ema", "accumulation", "scaling"])
def test_other_updates_are_undone_as_a_whole(either_way, kind):
    variables, optimizer = built(lambda: otherwise(kind))
    assert not large_updates.updates_in_steps(optimizer, variables)
    for step in range(3):
        apply_if_finite(optimizer, gradients(step), variables)
    before = values(variables, optimizer)
    apply_if_finite(optimizer, spoil(gradients(3), 2), variables)
    assert same(before, values(variables, optimizer))


def test_constraints_are_no_step():
    variables, optimizer = built(OPTIMIZERS["sgd"])
    variables[0].constraint = keras.constraints.NonNeg()
    assert not large_updates.updates_in_steps(optimizer, variables)


def test_buckets_follow_one_another():
    sizes = [len(places) for places in large_updates.buckets(weights())]
    # 12 and 1, 5, and 12 elements.
    assert sizes == [2, 1, 1]


def test_memory_is_dear_on_accelerators(monkeypatch):
    assert not large_updates.lacks_memory(weights())
    gpu = large_updates.device_of(weights()[0])._replace(platform="cuda")
    monkeypatch.setattr(large_updates, "device_of", lambda variable: gpu)
    assert large_updates.lacks_memory(weights())


def test_an_interruption_waits_for_the_update_to_end(
    rehearsed, interruptible, monkeypatch
):
    variables, optimizer = built(OPTIMIZERS["adam"])
    expected = built(OPTIMIZERS["adam"])
    expected[1].apply(gradients(0), expected[0])
    update, calls = type(optimizer)._backend_update_step, []

    def interrupted(self, *arguments):
        calls.append(len(arguments[1]))
        os.kill(os.getpid(), signal.SIGINT)
        update(self, *arguments)

    monkeypatch.setattr(type(optimizer), "_backend_update_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_if_finite(optimizer, gradients(0), variables)
    assert calls == [2, 1, 1]
    for one, other in zip(variables, expected[0], strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failure_in_the_middle_says_what_is_lost(rehearsed, monkeypatch):
    variables, optimizer = built(OPTIMIZERS["adam"])
    update, calls = type(optimizer)._backend_update_step, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no more")
        update(self, *arguments)

    monkeypatch.setattr(type(optimizer), "_backend_update_step", broken)
    with pytest.raises(RuntimeError, match=r"MemoryError: no more.*TrainingCheckpoint"):
        apply_if_finite(optimizer, gradients(0), variables)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, -2.0], [3.0]], True),
        ([[1.0, np.nan], [3.0]], False),
        ([[1.0, 2.0], [np.inf]], False),
        # Sums that cancel, and sums that overflow where no number does.
        ([[np.inf, 2.0], [-np.inf]], False),
        ([[3e38, 3e38], [3e38]], True),
        ([[3e38, 3e38], [np.nan]], False),
        ([], True),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_finite_is_told_number_by_number(values, expected, dtype):
    if dtype == "float16":
        values = [[6e4 if v == 3e38 else v for v in part] for part in values]
    tensors = [ops.convert_to_tensor(part, dtype) for part in values]
    tensors.append(ops.convert_to_tensor([7], "int32"))
    assert bool(updates._all_finite(tensors)) is expected
