"""Training on one and on several devices of JAX; run by a test.

    python tests/jax_devices.py FOLDER

Writes what came of it to the folder, a pickle.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import pickle
import shutil
import sys
from pathlib import Path
from unittest import mock

import block_tensorflow  # noqa: F401 (before anything else)
import jax
import keras
import keras_hub
import numpy as np
from helpers import ROTARY, to_numpy
from jax.sharding import NamedSharding, PartitionSpec
from replica_cases import CASES, adapted, critic, plain, rows, run, sampler

import keras_ebft
from keras_ebft.kernels import row_chunks
from keras_ebft.kernels.linear_logprob import chunked as scoring
from keras_ebft.kernels.linear_logprob.reference import (
    linear_logprob_reference as scores,
)
from keras_ebft.kernels.linear_sample import chunked as drawing
from keras_ebft.kernels.linear_sample.reference import (
    linear_sample_reference as draws,
)

parallel = keras.distribution
folder = Path(sys.argv[1])
SUPERVISED = "supervised, three rows"


def devices(count):
    """`DataParallel` on so many devices; `None` for one."""
    found = None
    if count > 1:
        found = parallel.DataParallel(devices=parallel.list_devices()[:count])
    parallel.set_distribution(found)


def backbone():
    return keras_hub.models.LlamaBackbone(**{**ROTARY, "num_layers": 1})


def in_parts():
    """`ModelParallel` on 2 x 2 devices."""
    mesh = parallel.DeviceMesh((2, 2), ("batch", "model"))
    layout = keras_ebft.distribution.layout_map(backbone, mesh)
    parallel.set_distribution(
        parallel.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )


def trained():
    """Packed rows at random anchors with a reference; 3 rows in a batch of 4."""
    random = sampler(anchors="random", num_anchors=3)
    model = plain(sampler=random, kl_weight=0.1, micro_batches=2)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    data = rows(3, packed=True)
    return model, run(model, optimizer, batch_size=3, data=data)


def adapters():
    """Adapters and a critic, samples read one after another."""
    model = adapted(critic=critic(), micro_batches=2)
    return run(model, batch_size=3, data=rows(3))


def shares(model):
    """Which part of each matrix the first device holds, by path."""
    variables = [*model.variables, *model.optimizer.variables]
    return {
        variable.path: variable.value.addressable_shards[0].data.nbytes
        / variable.value.nbytes
        for variable in variables
        if len(variable.shape) > 1
    }


class Stop(keras.callbacks.Callback):
    """Ends a run in the middle of an epoch, after its second step."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


def steps(*callbacks):
    """Four steps on rollouts: how many there were each time, and the weights."""
    made = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: made.append(model.steps_trained)
    )
    model = plain(ce_weight=0.1)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    model.fit(rows(), batch_size=2, verbose=0, callbacks=[note, *callbacks])
    return made, [to_numpy(variable.value) for variable in model.causal_lm.variables]


def resumed():
    """Two steps on four devices, the others on four and on one."""
    path, other = folder / "run.weights.h5", folder / "other.weights.h5"
    devices(4)
    whole = steps()
    checkpoint = keras_ebft.TrainingCheckpoint(path, save_freq=1)
    try:
        steps(checkpoint, Stop())
    except KeyboardInterrupt:
        shutil.copy(path, other)
    on_four = steps(keras_ebft.TrainingCheckpoint(path, save_freq=1))
    devices(1)
    on_one = steps(keras_ebft.TrainingCheckpoint(other, save_freq=1))
    return {"whole": whole, "on four": on_four, "on one": on_one}


def head_in_chunks():
    """Scores and draws of 36 rows on four devices, in chunks: programs and results.

    Nine rows of each device are no multiple of a chunk's.
    """
    distribution = keras.distribution.distribution()
    mesh = distribution.device_mesh.backend_mesh
    spread = NamedSharding(mesh, PartitionSpec(distribution.batch_dim_name))
    whole = NamedSharding(mesh, PartitionSpec())
    random = np.random.default_rng(0)
    hidden, head = (random.normal(size=(n, 8)).astype("float32") for n in (36, 50))
    labels = random.integers(0, 50, 36).astype("int32")
    uniform = random.random(36).astype("float32")

    def weighed(score):
        def loss(hidden, head, labels):
            log_prob, entropy = score(hidden, head, labels, temperature=0.7)
            return keras.ops.sum(log_prob * uniform + entropy)

        return jax.value_and_grad(loss, argnums=(0, 1))

    found = {}
    for name, other, function, definition in (
        ("scores", labels, *map(weighed, (scoring.linear_logprob_chunked, scores))),
        ("draws", uniform, drawing.linear_sample_chunked, draws),
    ):
        rows = [jax.device_put(values, spread) for values in (hidden, other)]
        inputs = rows[0], jax.device_put(head, whole), rows[1]
        compiled = jax.jit(function).lower(*inputs).compile()
        found[name] = {
            "program": compiled.as_text(),
            "found": jax.tree.leaves(jax.tree.map(np.asarray, compiled(*inputs))),
            "expected": jax.tree.leaves(definition(hidden, head, other)),
        }
    return found


found = {"one": trained()[1], "adapters on one": adapters()}
devices(4)
with (
    mock.patch.multiple(row_chunks, CHUNK_ELEMENTS=200, MIN_CHUNK_ROWS=4),
    mock.patch.multiple(scoring, ROWS=4, TOKENS=16),
):
    found["head"] = head_in_chunks()
found["four"] = trained()[1]
in_parts()
model, found["parts"] = trained()
found["shares"] = shares(model)
found["adapters in parts"] = adapters()
devices(1)
found["shares of unlike size on 1"] = CASES["shares of unlike size"]()
for count in (1, 2):
    devices(count)
    found[f"{SUPERVISED} on {count}"] = CASES[SUPERVISED]()
found["resumed"] = resumed()
(folder / "found.pkl").write_bytes(pickle.dumps(found))
