"""One of several processes of JAX that train together; run by a test.

    python tests/jax_processes.py RANK SIZE FOLDER PORT

Writes what came of it to the folder, a pickle.
"""

import pickle
import sys
from pathlib import Path

import block_tensorflow  # noqa: F401 (before anything else)
import jax
import keras
import numpy as np
import pytest
from helpers import llama
from jax.experimental import multihost_utils
from replica_cases import CASES, own_rows, rows

import keras_ebft

rank, size, folder, port = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
keras.distribution.initialize(f"localhost:{port}", int(size), int(rank))
with pytest.raises(ValueError, match=r"2 processes without a keras\.distribution"):
    keras_ebft.EBFTModel.sft(llama(num_layers=1))
keras.distribution.set_distribution(keras.distribution.DataParallel())
NAMES = ("supervised, three rows", "shares of unlike size")
cases = {name: CASES[name]() for name in NAMES}
np.random.seed(int(rank))
model = keras_ebft.EBFTModel.sft(llama(num_layers=1))
model.compile("sgd")
checkpoint = keras_ebft.TrainingCheckpoint(Path(folder) / f"saved_{rank}.weights.h5")
model.fit(rows(2), verbose=0, callbacks=[checkpoint])
found = {"cases": cases, "seed": model.seed}


def trained(epochs, *callbacks, data=None):
    """Steps and weights of a model that is made anew."""
    data = rows(2) if data is None else data
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=1)
    model.compile("sgd")
    model.fit(data, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return [int(model.optimizer.iterations), *model.causal_lm.get_weights()]


# All processes are given the same file.
one_path = Path(folder) / "one.weights.h5"
trained(1, keras_ebft.TrainingCheckpoint(one_path))
found["files"] = sorted(path.name for path in one_path.parent.glob("*one.weights.h5"))
multihost_utils.sync_global_devices("looked")
found["resumed"] = trained(2, keras_ebft.TrainingCheckpoint(one_path))
found["whole"] = trained(2)
own = own_rows(rows(4), [[0, 1], [2, 3]])
own_path = keras_ebft.TrainingCheckpoint(Path(folder) / "own.weights.h5")
trained(1, own_path, data=own)
multihost_utils.sync_global_devices("written")
found["own, resumed"] = trained(2, own_path, data=own)
found["own, whole"] = trained(2, data=own)
(Path(folder) / f"found_{rank}.pkl").write_bytes(pickle.dumps(found))
