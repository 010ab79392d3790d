"""Several devices, and several processes, of JAX train as one does."""

import os
import pickle
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from replica_cases import difference
from together import free_ports, run_together

BACKEND = keras.backend.backend()
TESTS = Path(__file__).parent
# Seconds, of which most are spent compiling on a busy machine.
BOUND = 550
pytestmark = [
    pytest.mark.skipif(BACKEND != "jax", reason="of JAX"),
    pytest.mark.slow,
    pytest.mark.compiled,
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a program with four virtual devices found."""
    folder = tmp_path_factory.mktemp("devices")
    run_together(TESTS / "jax_devices.py", [[folder]], folder, BOUND, ENVIRONMENT)
    return pickle.loads((folder / "found.pkl").read_bytes())


def test_devices_train_as_one(found):
    """Also where they do not divide a batch, under both distributions of Keras."""
    for run, expected in (
        ("four", "one"),
        ("parts", "one"),
        ("adapters in parts", "adapters on one"),
        ("supervised, three rows on 2", "supervised, three rows on 1"),
    ):
        worst, where = difference(found[run], found[expected])
        assert worst < 1e-5, (run, where)


@pytest.mark.parametrize(("call", "sums"), [("scores", True), ("draws", False)])
def test_each_device_scores_and_draws_its_own_rows(found, call, sums):
    """Chunks of rows that lie on one device would be sent to all of them."""
    head = found["head"][call]
    for own, expected in zip(head["found"], head["expected"], strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=2e-5)
    assert " while(" in head["program"]
    assert " all-gather(" not in head["program"]
    assert (" all-reduce(" in head["program"]) == sums


def test_copies_and_slots_are_held_in_parts_as_the_weights_are(found):
    shares = found["shares"]
    policy = {
        path: share
        for path, share in shares.items()
        if path.startswith(("token_embedding/", "transformer_layer_0/"))
    }
    assert len(policy) == 9
    for path, share in policy.items():
        # Nothing divides a vocabulary of 31.
        assert share == (0.5 if "embedding" in path else 0.25), path
        assert shares[f"frozen_network/{path}"] == share
        slot = f"{path.replace('/', '_')}_momentum"
        assert [s for p, s in shares.items() if p.endswith(slot)] == [share]


def test_what_four_devices_wrote_in_an_epoch_goes_on(found):
    """On four to the same bits, on one within rounding."""
    made, whole = found["resumed"]["whole"]
    made_on_four, on_four = found["resumed"]["on four"]
    made_on_one, on_one = found["resumed"]["on one"]
    assert made == [1, 2, 3, 4]
    # What was trained before is gone past.
    assert made_on_four == made_on_one == [2, 2, 3, 4]
    assert all(map(np.array_equal, whole, on_four))
    for expected, other in zip(whole, on_one):
        np.testing.assert_allclose(other, expected, atol=1e-6)


def test_processes_with_the_same_data_train_as_one(found, tmp_path):
    (port,) = free_ports(1)
    arguments = [[rank, 2, tmp_path, port] for rank in range(2)]
    run_together(TESTS / "jax_processes.py", arguments, tmp_path, BOUND, ENVIRONMENT)
    files = [tmp_path / f"found_{rank}.pkl" for rank in range(2)]
    first, second = (pickle.loads(file.read_bytes()) for file in files)
    for own in (first, second):
        for name, values in own["cases"].items():
            worst, where = difference(values, found[f"{name} on 1"])
            assert worst < 1e-5, where
    assert first["seed"] == second["seed"]
    written = [(tmp_path / f"saved_{rank}.weights.h5").exists() for rank in range(2)]
    assert written == [True, False]
    for own in (first, second):
        assert own["files"] == ["one.weights.h5"]
        # The optimizer's steps are in the file, too.
        assert own["resumed"][0] == own["whole"][0] == 2
        assert all(map(np.array_equal, own["resumed"], own["whole"]))
        pairs = zip(own["own, resumed"], own["own, whole"])
        assert all(np.array_equal(*pair) for pair in pairs)
