"""Several processes of PyTorch or TensorFlow train as one does."""

import csv
import os
import pickle
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import llama, to_numpy
from replica_cases import CASES, CASES_OF, difference, plain, rows
from together import free_ports, run_together

import keras_ebft
from keras_ebft.backend import replicas

BACKEND = keras.backend.backend()
TESTS = Path(__file__).parent
# Seconds. Tracing for TensorFlow takes 250 alone on two slow cores, with others 500.
BOUND = 900
SIZE = 2
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
on_processes = pytest.mark.skipif(
    BACKEND == "jax", reason="one program of all devices: test_jax_devices.py"
)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """`(folder, what each of two processes found, what they wrote)`."""
    folder = tmp_path_factory.mktemp("together")
    ports = free_ports(SIZE)
    output = run_together(
        TESTS / "replica_worker.py",
        [[rank, folder, *ports] for rank in range(SIZE)],
        folder,
        BOUND,
        {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    files = [folder / f"found_{rank}.pkl" for rank in range(SIZE)]
    return folder, [pickle.loads(file.read_bytes()) for file in files], output


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("case", CASES_OF.get(BACKEND, CASES))
def test_processes_train_as_one(together, case):
    """Weights, `History` and what `evaluate` returns, in every process."""
    expected = CASES[case]()
    for found in together[1]:
        worst, where = difference(found[case], expected)
        assert worst < 2e-6, where


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_equal_rows_of_different_processes_draw_different_rollouts(together):
    first, second = (found["drawn"] for found in together[1])
    for one, other in zip(first, second):
        drawn = [*one, *other]
        assert len(drawn) == 4
        assert len({values.tobytes() for values in drawn}) == 4


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("case", ["resumed", "of_own_rows"])
def test_training_resumes_bit_for_bit_from_what_the_first_process_wrote(together, case):
    for found in together[1]:
        whole, resumed = found[case]["whole"], found[case]["resumed"]
        assert all(map(np.array_equal, whole["weights"], resumed["weights"]))
        last = {name: values[-1] for name, values in whole["history"].items()}
        assert {k: v[-1] for k, v in resumed["history"].items()} == last


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_one_path_for_all_processes_is_written_by_one(together):
    for found in together[1]:
        shared, whole = found["at_one_path"], found["resumed"]["whole"]
        assert shared["files"] == ["one.weights.h5", "previous-one.weights.h5"]
        assert all(map(np.array_equal, shared["weights"], whole["weights"]))


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_one_process_goes_on_where_two_were_interrupted(together):
    folder, (found, _), _ = together
    model = plain()
    model.compile(keras.optimizers.Adam(0.01))
    checkpoint = keras_ebft.TrainingCheckpoint(folder / "interrupted_0.weights.h5")
    model.fit(rows(), batch_size=4, epochs=2, verbose=0, callbacks=[checkpoint])
    assert model.training_state.epoch == 2
    for variable, expected in zip(
        model.causal_lm.variables, found["resumed"]["whole"]["weights"]
    ):
        np.testing.assert_allclose(to_numpy(variable.value), expected, atol=1e-5)


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_only_the_first_process_writes_and_others_follow_it(together):
    folder, found, output = together
    first, second = (values["written"] for values in found)
    assert first["seed"] == second["seed"]
    assert all(map(np.array_equal, first["weights"], second["weights"]))
    kinds = ("log_{}.csv", "best_{}.keras", "saved_{}.keras", "of_{}/run.weights.h5")
    for kind in kinds:
        written = [(folder / kind.format(rank)).exists() for rank in range(SIZE)]
        assert written == [True, False], kind
    with (folder / "log_0.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    assert "fall together" in output[0]
    assert "fall together" not in output[1]
    saved = keras.saving.load_model(folder / "saved_0.keras")
    for variable, expected in zip(saved.causal_lm.variables, first["weights"]):
        np.testing.assert_array_equal(to_numpy(variable.value), expected)


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_a_run_is_refused_where_the_rows_of_one_process_are_others(together):
    for found in together[1]:
        assert "checksum" in found["of_own_rows"]["said"]


@on_processes
@pytest.mark.slow
@pytest.mark.compiled
def test_shares_that_do_not_go_together_are_refused_in_every_process(together):
    first, second = (found["refused"] for found in together[1])
    assert first == second
    assert first["steps"] == 6
    for said, expected in zip(
        first["said"],
        ("Pass `steps_per_epoch`", "Received: 3", "some with 'segment_ids'"),
    ):
        assert expected in said


@pytest.mark.backend_independent
def test_a_process_that_fails_ends_the_others(tmp_path):
    """Of the tests themselves: nothing waits for what never comes."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "if sys.argv[1] == '0':\n    time.sleep(60)\nraise SystemExit('broken')"
    )
    with pytest.raises(AssertionError, match=r"\[None, 1\][\s\S]*broken"):
        run_together(program, [["0"], ["1"]], tmp_path, 50)
    with pytest.raises(AssertionError, match="too late"):
        run_together(program, [["0"]], tmp_path, 0.5)


@on_torch
def test_processes_of_torchrun_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes.*init_process_group"):
        keras_ebft.EBFTModel.sft(llama(num_layers=1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    keras_ebft.EBFTModel.sft(llama(num_layers=1))


@on_processes
def test_one_replica_computes_and_sends_nothing_more():
    """The very tensors come back."""
    values = {"a": keras.ops.ones((2, 3))}
    assert replicas.num_processes() == replicas.num_shares() == 1
    with replicas.shared_step():
        assert replicas.all_rows(values) is values
        assert replicas.own_rows(values["a"], 2) is values["a"]
        assert replicas.counted_once(values["a"]) is values["a"]
        assert replicas.summed_gradients([values["a"], None])[0] is values["a"]
        assert replicas.from_first(values) is values


@on_torch
def test_layers_after_fully_shard_are_refused(tmp_path):
    import torch
    from torch.distributed.fsdp import fully_shard

    causal_lm = llama(num_layers=1)
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        # Without an error, and without having shared anything out.
        fully_shard(causal_lm.backbone, mesh=mesh)
        with pytest.raises(ValueError, match=r"backbone.*' after fully_shard"):
            keras_ebft.EBFTModel.sft(causal_lm)
    finally:
        torch.distributed.destroy_process_group()
