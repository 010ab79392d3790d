"""What several replicas must train as one does: each case is a small `fit`."""

import keras
import numpy as np
from helpers import VOCABULARY, llama, to_numpy

import keras_ebft
from keras_ebft.backend import replicas

LENGTH = 20
# Of real tokens in each row: what replicas average is unevenly filled.
LENGTHS = (20, 5, 20, 9, 12, 20, 20)


def rows(count=7, seed=0, packed=False):
    """Rows of unlike length; packed ones hold two documents."""
    random = np.random.default_rng(seed)
    places = np.arange(LENGTH)
    found = {
        "token_ids": random.integers(1, VOCABULARY, (count, LENGTH)).astype("int32"),
        "padding_mask": places < np.array(LENGTHS[:count])[:, None],
    }
    if packed:
        middle = random.integers(3, 14, (count, 1))
        found["segment_ids"] = (1 + (places >= middle)).astype("int32")
        found["segment_ids"] *= found["padding_mask"]
    return found


def sampler(**changes):
    settings = {"rollout_length": 2, "stride": 3, "context_length": 2, "num_samples": 2}
    return keras_ebft.BlockSampler(**{**settings, **changes})


def plain(**settings):
    settings.setdefault("sampler", sampler(temperature=1.0))
    return keras_ebft.EBFTModel(llama(num_layers=1), seed=3, **settings)


def adapted(**settings):
    causal_lm = llama(num_layers=1)
    keras.utils.set_random_seed(1)
    causal_lm.backbone.enable_lora(2)
    settings = {"sampler": sampler(), "ce_weight": 0.1, "seed": 3, **settings}
    return keras_ebft.EBFTModel(causal_lm, **settings)


def critic():
    return keras_ebft.Critic(optimizer=keras.optimizers.SGD(0.1), selection="all")


def regularised():
    causal_lm = llama(num_layers=1)
    embedding = causal_lm.backbone.token_embedding
    embedding.embeddings_regularizer = keras.regularizers.L2(0.1)
    embedding._embeddings.regularizer = embedding.embeddings_regularizer
    return keras_ebft.EBFTModel(causal_lm, sampler=sampler(), ce_weight=1.0, seed=3)


def run(model, optimizer=None, batch_size=4, data=None, evaluate=False, **options):
    """Trains and evaluates; everything that came of it, arrays by name."""
    model.compile(optimizer or keras.optimizers.SGD(0.05))
    data = rows() if data is None else data
    history = model.fit(data, batch_size=batch_size, verbose=0, **options).history
    found = {f"history/{name}": np.array(value) for name, value in history.items()}
    if evaluate:
        evaluated = model.evaluate(rows(3, seed=2), return_dict=True, verbose=0)
        found |= {f"evaluate/{name}": np.array(v) for name, v in evaluated.items()}
    for index, variable in enumerate(model.causal_lm.trainable_variables):
        found[f"weights/{index} {variable.path}"] = to_numpy(variable.value)
    return found


def accumulating():
    return keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)


def replayed():
    """Given rollouts, of a batch that two replicas do not divide."""
    tokens = np.random.default_rng(5).integers(1, VOCABULARY, (3, 2, 6, 2))
    given = keras_ebft.ReplaySampler(tokens, stride=3, context_length=2)
    return plain(sampler=given)


def one_batch(model):
    """`train_on_batch` and `test_on_batch`."""
    model.compile(keras.optimizers.SGD(0.05))
    trained = model.train_on_batch(rows(3), return_dict=True)
    tested = model.test_on_batch(rows(3, seed=1), return_dict=True)
    found = {f"train/{name}": np.array(value) for name, value in trained.items()}
    return found | {f"test/{name}": np.array(value) for name, value in tested.items()}


def own_rows(whole, places):
    """The rows that a process alone has; all, in the order of batches, with one."""
    if replicas.num_processes() == 1:
        return whole
    own = places[replicas.process_index()]
    return keras_ebft.data.ProcessShare({k: values[own] for k, values in whole.items()})


def shared_out():
    """Batches of four, of which each of two processes has two rows."""
    data = own_rows(rows(), [[0, 1, 4, 5], [2, 3, 6]])
    return run(plain(), data=data, shuffle=False, evaluate=True)


def unlike_shares():
    """One process has five rows, the other a shorter one."""
    whole = rows(6)
    if replicas.num_processes() == 1:
        # Batches of four: rows without a token where a process has none left.
        chosen = [0, 1, 4, None, 2, 3, None, None, 5, None, None, None]
        places = [place or 0 for place in chosen]
        data = {name: values[places] for name, values in whole.items()}
        data["padding_mask"][[place is None for place in chosen]] = False
        return run(plain(kl_weight=0.1), data=data, shuffle=False)
    data = own_rows(whole, [[0, 1, 2, 3, 5], [4]])
    if replicas.process_index():
        cut = {name: values[:, : LENGTHS[4]] for name, values in whole.items()}
        data = own_rows(cut, [None, [4]])
    return run(plain(kl_weight=0.1), data=data, shuffle=False)


CASES = {
    "unevenly filled rows, a last partial batch": lambda: run(
        plain(), evaluate=True, validation_data=rows(5, seed=1)
    ),
    "packed rows, random anchors": lambda: run(
        plain(sampler=sampler(anchors="random", num_anchors=3), ce_weight=0.3),
        data=rows(packed=True),
    ),
    "adapters, micro batches": lambda: run(adapted()),
    "divergence, several updates, accumulation": lambda: run(
        plain(
            kl_weight=0.1,
            updates_per_rollout=2,
            clip_range=0.2,
            micro_batches=2,
            entropy_weight=0.01,
            policy_loss="sequence",
        ),
        accumulating(),
    ),
    "a critic": lambda: run(plain(critic=critic())),
    "a regularizer": lambda: run(regularised()),
    "supervised, three rows": lambda: run(
        keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=3), batch_size=3
    ),
    "given rollouts": lambda: run(replayed(), batch_size=3, data=rows(3)),
    "rows shared out already": shared_out,
    "shares of unlike size": unlike_shares,
    "one batch": lambda: one_batch(plain()),
}

# TensorFlow takes ten times as long: what two cases say is said by one of them there.
CASES_OF = {
    "torch": tuple(CASES),
    "tensorflow": (
        "unevenly filled rows, a last partial batch",
        "packed rows, random anchors",
        "adapters, micro batches",
        "divergence, several updates, accumulation",
        "shares of unlike size",
    ),
}


def difference(found, expected):
    """The greatest difference between two runs, and where it is."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = (0.0, "")
    for name, value in expected.items():
        assert np.array_equal(np.isnan(value), np.isnan(found[name])), name
        off = np.nan_to_num(np.abs(found[name] - value)) / np.maximum(np.abs(value), 1)
        worst = max(worst, (float(np.nan_to_num(off).max(initial=0.0)), name))
    return worst
