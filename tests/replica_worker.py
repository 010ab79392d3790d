"""One of several processes that train together; run by a test.

    python tests/replica_worker.py RANK FOLDER PORT PORT...

Writes what came of every case to the folder, a pickle.
"""

import contextlib
import datetime
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

if os.environ["KERAS_BACKEND"] == "torch":
    import block_tensorflow  # noqa: F401 (before anything else)
import keras
import numpy as np
import pytest
from helpers import llama, to_numpy
from keras import ops
from replica_cases import CASES, CASES_OF, own_rows, plain, rows, sampler

import keras_ebft
from keras_ebft.backend import replicas
from keras_ebft.data.row_batches import RowBatches
from keras_ebft.layout.documents import read_documents
from keras_ebft.layout.draws import draw_numbers

rank, folder, ports = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=len(ports),
        timeout=datetime.timedelta(seconds=300),
    )
else:
    import tensorflow as tf

    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()


class StopsAt(keras.callbacks.Callback):
    """Ends the program in the middle of the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch:
            raise SystemExit


def weights(model):
    return [to_numpy(variable.value) for variable in model.causal_lm.variables]


def trained(*callbacks, data=None):
    model = plain()
    model.compile(keras.optimizers.Adam(0.01))
    data = rows() if data is None else data
    fitted = model.fit(data, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    return {"weights": weights(model), "history": fitted.history}


def resumed():
    """Uninterrupted, and interrupted; the file is seen by the first process alone."""
    path = folder / f"of_{rank}" / "run.weights.h5"
    checkpoint = keras_ebft.TrainingCheckpoint(path, save_freq=1)
    with contextlib.suppress(SystemExit):
        trained(checkpoint, StopsAt())
    if path.exists():
        shutil.copy(path, folder / f"interrupted_{rank}.weights.h5")
    return {"whole": trained(), "resumed": trained(checkpoint)}


def at_one_path():
    """Interrupted and resumed; all processes are given the same file."""
    checkpoint = keras_ebft.TrainingCheckpoint(folder / "one.weights.h5", save_freq=1)
    with contextlib.suppress(SystemExit):
        trained(checkpoint, StopsAt())
    replicas.wait_for_all()
    files = sorted(path.name for path in folder.glob("*one.weights.h5"))
    # No process may write before all have looked.
    replicas.wait_for_all()
    return {"files": files, "weights": trained(checkpoint)["weights"]}


def of_own_rows():
    """The same with rows of each process's own, and with others in one of them."""
    checkpoint = keras_ebft.TrainingCheckpoint(folder / "own.weights.h5", save_freq=1)
    data = own_rows(rows(), [[0, 1, 4, 5], [2, 3, 6]])
    with contextlib.suppress(SystemExit):
        trained(checkpoint, StopsAt(), data=data)
    replicas.wait_for_all()
    with pytest.raises(ValueError) as error:
        trained(checkpoint, data=own_rows(rows(), [[0, 1, 4, 5], [2, 3, 4]]))
    found = {"whole": trained(data=data), "resumed": trained(checkpoint, data=data)}
    return {**found, "said": str(error.value)}


def drawn():
    """The numbers that decide rollouts, of two equal rows in every process."""
    documents = read_documents(
        {
            "token_ids": ops.ones((2, 20), dtype="int32"),
            "padding_mask": ops.ones((2, 20), dtype="bool"),
        }
    )
    random = sampler(anchors="random", num_anchors=3)
    with replicas.shared_step():
        return [to_numpy(numbers) for numbers in draw_numbers(random, documents, 5)]


def written():
    """A model of other weights and another seed in every process, and its files."""
    np.random.seed(rank)
    causal_lm = llama()
    causal_lm.set_weights([w + rank for w in causal_lm.get_weights()])
    model = keras_ebft.EBFTModel.sft(causal_lm)
    model.compile("sgd")
    callbacks = [
        keras.callbacks.CSVLogger(folder / f"log_{rank}.csv"),
        keras.callbacks.ModelCheckpoint(folder / f"best_{rank}.keras"),
    ]
    model.fit(rows(2), verbose=0, callbacks=callbacks)
    model.save(folder / f"saved_{rank}.keras")
    return {"seed": model.seed, "weights": weights(model)}


def refused():
    """What is said of a stream without an end, or with batches nobody can share."""
    model = plain()
    model.compile("sgd")
    said = []
    unsized = keras_ebft.data.ProcessShare(iter([rows(2)]))
    some = rows(2, packed=rank == 0)
    for data, options in (
        (unsized, {}),
        (keras_ebft.data.ProcessShare(rows(3)), {"batch_size": 3}),
        (keras_ebft.data.ProcessShare(some), {"batch_size": 4}),
    ):
        with pytest.raises(ValueError) as error:
            model.fit(data, verbose=0, **options)
        said.append(str(error.value))
    own = RowBatches(rows(2 + 2 * rank), 2, shuffle=False, seed=0)
    repeated = keras_ebft.data.ProcessShare(own)
    history = model.fit(repeated, steps_per_epoch=3, epochs=2, verbose=0).history
    return {"said": said, "steps": model.steps_trained, "loss": history["loss"]}


found = {name: CASES[name]() for name in CASES_OF[BACKEND]}
found |= {"resumed": resumed(), "at_one_path": at_one_path()}
found |= {"of_own_rows": of_own_rows()}
found |= {"drawn": drawn(), "written": written(), "refused": refused()}
(folder / f"found_{rank}.pkl").write_bytes(pickle.dumps(found))
