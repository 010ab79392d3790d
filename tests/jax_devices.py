"""Training on one and on several devices of JAX; run by a test.

    python tests/jax_devices.py FOLDER

Writes what came of it to the folder, a pickle.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import pickle
import sys
from pathlib import Path

import block_tensorflow  # noqa: F401 (before anything else)
import keras
import keras_hub
from helpers import ROTARY, llama, to_numpy
from replica_cases import CASES, adapted, critic, plain, rows, run, sampler

import keras_ebft

parallel = keras.distribution
folder = Path(sys.argv[1])


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


def supervised(epochs, *callbacks):
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=3)
    model.compile(keras.optimizers.SGD(0.05))
    model.fit(rows(3), batch_size=3, epochs=epochs, verbose=0, callbacks=callbacks)
    return [to_numpy(variable.value) for variable in model.causal_lm.variables]


def resumed():
    """An epoch on four devices, the second on one."""
    checkpoint = keras_ebft.TrainingCheckpoint(folder / "run.weights.h5")
    devices(4)
    supervised(1, checkpoint)
    devices(1)
    return {"whole": supervised(2), "resumed": supervised(2, checkpoint)}


found = {"one": trained()[1], "adapters on one": adapters()}
devices(4)
found["four"] = trained()[1]
in_parts()
model, found["parts"] = trained()
found["shares"] = shares(model)
found["adapters in parts"] = adapters()
for count in (1, 2):
    devices(count)
    found[f"supervised on {count}"] = CASES["supervised, three rows"]()
found["resumed"] = resumed()
(folder / "found.pkl").write_bytes(pickle.dumps(found))
