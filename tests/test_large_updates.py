"""Updates of large weights: those of Keras, by parts, whole or not at all."""

import os
import signal

import keras
import numpy as np
import pytest
from helpers import to_numpy
from keras import ops

from keras_ebft.backend import (
    large_updates,
    partial_updates,
    program_updates,
    row_updates,
    updates,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX chooses between states: updates.py"
)
BY_PARTS = updates.is_rehearsed
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
    """Scalars alone are small, a bucket holds one or two of the weights, rows few."""
    monkeypatch.setattr(updates, "SMALL", 1)
    monkeypatch.setattr(large_updates, "BUCKET", 16)
    monkeypatch.setattr(row_updates, "CACHED", {"cpu": 7})
    # One weight is compiled by XLA, the others are not.
    monkeypatch.setattr(program_updates, "LARGE", 12)


@pytest.fixture
def rehearsed(monkeypatch):
    """As on accelerators, for optimizers that have to see all of a weight."""
    monkeypatch.setattr(large_updates, "updates_by_parts", lambda optimizer: False)
    monkeypatch.setattr(updates, "is_rehearsed", lambda optimizer, variables: True)


@pytest.fixture
def copied(monkeypatch):
    monkeypatch.setattr(updates, "is_rehearsed", lambda optimizer, variables: False)


@pytest.fixture
def interruptible():
    """As where a user can interrupt: what runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["by parts", "rehearsed", "copied"])
def either_way(request):
    if request.param != "by parts":
        request.getfixturevalue(request.param)


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


def step_of(optimizer, variables, in_graph=True):
    """A function of gradients that updates as a step does.

    In a graph where steps run in one, if that makes a difference.
    """

    def step(found):
        with large_updates.replaced(
            optimizer, apply=updates._apply_if_finite(optimizer, [])
        ):
            optimizer.apply(found, variables)

    in_graph = in_graph and updates.is_rehearsed is BY_PARTS
    if keras.backend.backend() == "tensorflow" and in_graph:
        import tensorflow as tf

        return tf.function(step, autograph=False)
    return step


def apply_if_finite(optimizer, found, variables):
    step_of(optimizer, variables)(found)


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
    update = step_of(found[1], found[0])
    for step in range(3):
        expected[1].apply(gradients(step), expected[0])
        update(gradients(step))
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
    update = step_of(optimizer, variables)
    for step in range(3):
        update(gradients(step))
    before = values(variables, optimizer)
    update(spoil(gradients(3), 2))
    assert same(before, values(variables, optimizer))


def test_constraints_are_no_step():
    variables, optimizer = built(OPTIMIZERS["sgd"])
    variables[0].constraint = keras.constraints.NonNeg()
    assert not large_updates.updates_in_steps(optimizer, variables)


def test_buckets_follow_one_another():
    sizes = [len(places) for places in large_updates.buckets(weights())]
    # 12 and 1, 5, and 12 elements.
    assert sizes == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "on_cpu"), [("adamw", True), ("adafactor", False), ("muon", False)]
)
def test_memory_is_dear_on_accelerators(monkeypatch, name, on_cpu):
    variables, optimizer = built(OPTIMIZERS[name])
    assert large_updates.is_rehearsed(optimizer, variables) is on_cpu
    gpu = large_updates.device_of(variables[0])._replace(platform="cuda")
    monkeypatch.setattr(large_updates, "device_of", lambda variable: gpu)
    assert large_updates.is_rehearsed(optimizer, variables)


@pytest.mark.parametrize("kind", partial_updates.ELEMENTWISE)
def test_optimizers_that_update_by_parts_change_as_keras_has_it(kind):
    options = {}
    if kind in (keras.optimizers.SGD, keras.optimizers.RMSprop):
        options["momentum"] = 0.9
    if kind is keras.optimizers.RMSprop:
        options["centered"] = True
    if kind is keras.optimizers.Adam:
        options["amsgrad"] = True

    def make():
        return kind(0.1, weight_decay=0.1, **options)

    expected, found = built(make), built(make)
    assert partial_updates.updates_by_parts(found[1])
    update = step_of(found[1], found[0])
    for step in range(2):
        expected[1].apply(gradients(step), expected[0])
        update(gradients(step))
    for one, other in zip(values(*found), values(*expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_optimizers_of_users_are_not_cut_into_parts():
    class Own(keras.optimizers.SGD):
        pass

    class Other(keras.optimizers.Optimizer):
        def update_step(self, gradient, variable, learning_rate):
            """Nothing."""

    assert not partial_updates.updates_by_parts(Own(0.1))
    assert not partial_updates.updates_by_parts(Other(0.1))


@pytest.mark.parametrize("excluded", ["first", "all of a bucket", "all"])
def test_weight_decay_leaves_out_what_a_user_leaves_out(either_way, excluded):
    """PyTorch's own refuses a bucket without any weight that decays."""
    chosen = {"first": [0], "all of a bucket": [2], "all": [0, 1, 2, 3]}[excluded]
    variables, optimizer = built(lambda: keras.optimizers.SGD(0.1, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_list=[variables[i] for i in chosen])
    before = [to_numpy(variable) for variable in variables]
    zeros = [np.zeros(shape, "float32") for shape in SHAPES]
    apply_if_finite(optimizer, list(map(ops.convert_to_tensor, zeros)), variables)
    for place, (variable, value) in enumerate(zip(variables, before)):
        decayed = value if place in chosen else value * (1 - 0.1 * 0.5)
        np.testing.assert_allclose(to_numpy(variable), decayed, rtol=1e-6)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        # A single row has four, one, one and six elements.
        (7, [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3), (1, 0, 1), (2, 0, 2)]]),
        (1000, [[(0, 0, 3), (1, 0, 1), (2, 0, 5), (3, 0, 2)]]),
    ],
)
def test_rows_follow_one_another(elements, expected):
    found = list(row_updates.rows_of(weights(), elements))
    assert [[tuple(part) for part in rows] for rows in found[: len(expected)]] == (
        expected
    )
    seen = [
        (part.place, row)
        for rows in found
        for part in rows
        for row in range(part.start, part.stop)
    ]
    assert seen == [
        (place, row)
        for place, shape in enumerate(SHAPES)
        for row in range(shape[0] if shape else 1)
    ]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")
def test_outside_of_graphs_updates_are_the_same():
    """As with `run_eagerly=True`."""
    expected, found = built(OPTIMIZERS["adamw"]), built(OPTIMIZERS["adamw"])
    update = step_of(found[1], found[0], in_graph=False)
    for step in range(2):
        expected[1].apply(gradients(step), expected[0])
        update(gradients(step))
    for one, other in zip(values(*found), values(*expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")
def test_without_xla_graphs_compute_the_same(monkeypatch):
    import tensorflow as tf

    expected = built(OPTIMIZERS["adamw"])
    apply_if_finite(expected[1], gradients(0), expected[0])
    program_updates._has_xla.cache_clear()
    assert program_updates._has_xla()
    program_updates._has_xla.cache_clear()
    function = tf.function

    def refused(*arguments, **options):
        if options.get("jit_compile"):
            raise tf.errors.UnimplementedError(None, None, "no XLA here")
        return function(*arguments, **options)

    monkeypatch.setattr(tf, "function", refused)
    assert not program_updates._has_xla()
    found = built(OPTIMIZERS["adamw"])
    apply_if_finite(found[1], gradients(0), found[0])
    program_updates._has_xla.cache_clear()
    for one, other in zip(values(*found), values(*expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.fixture(params=["by parts", "rehearsed"])
def uncopied(request):
    if request.param == "rehearsed":
        request.getfixturevalue("rehearsed")
    elif keras.backend.backend() != "torch":
        pytest.skip("a graph of TensorFlow is not interrupted between two operations")
    return request.param


def test_an_interruption_waits_for_the_update_to_end(
    uncopied, interruptible, monkeypatch
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
    # Rehearsed weights are updated in buckets, parts rehearsed and updated alike.
    assert calls == ([2, 1, 1] if uncopied == "rehearsed" else 2 * [1, 1, 3, 1, 1, 1])
    for one, other in zip(variables, expected[0], strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failure_in_the_middle_says_what_is_lost(uncopied, monkeypatch):
    variables, optimizer = built(OPTIMIZERS["adam"])
    update, calls = type(optimizer)._backend_update_step, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) == (2 if uncopied == "rehearsed" else 8):
            raise MemoryError("no more")
        update(self, *arguments)

    monkeypatch.setattr(type(optimizer), "_backend_update_step", broken)
    with pytest.raises(RuntimeError, match=r"MemoryError: no more.*TrainingCheckpoint"):
        apply_if_finite(optimizer, gradients(0), variables)
