"""`fit` and `evaluate` as a Keras user knows them."""

import keras
import numpy as np
import pytest
from helpers import documents, family, flat, llama, to_numpy

import keras_ebft
from keras_ebft.training.batches import TokenBatches
from keras_ebft.training.fit_data import token_batches

LENGTH = 14
BACKEND = keras.backend.backend()
METRICS = {
    "loss",
    "feature_matching_loss",
    "whitened_feature_matching_loss",
    "alignment",
    "diversity",
    "reward",
    "best_alignment",
    "best_reward",
    "advantage_std",
    "zero_std_fraction",
    "policy_loss",
    "ce_loss",
    "perplexity",
    "entropy",
    "token_match",
    "live_block_fraction",
    "matching_score",
}
# Of updates, which evaluation has none of.
UPDATES = {"skipped_updates", "grad_norm"}


def build(causal_lm=None, seed=0, **options):
    sampler = keras_ebft.BlockSampler(
        rollout_length=3, stride=4, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    causal_lm = causal_lm or llama(num_layers=1)
    return keras_ebft.EBFTModel(causal_lm, sampler, network, seed=seed, **options)


class Fitted:
    """A model after one `fit` with many Keras features switched on."""

    def __init__(self):
        self.model = build(ce_weight=0.1)
        self.frozen_before = self.model.frozen_network.get_weights()
        self.weights_before = self.model.causal_lm.get_weights()
        schedule = keras.optimizers.schedules.ExponentialDecay(1e-2, 2, 0.5)
        self.model.compile(keras.optimizers.Adam(schedule, global_clipnorm=1.0))
        self.batches = []
        counter = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: self.batches.append(dict(logs))
        )
        self.history = self.model.fit(
            documents(5, LENGTH),
            batch_size=2,
            epochs=2,
            validation_data=documents(3, LENGTH, seed=1),
            callbacks=[counter],
            verbose=0,
        ).history


@pytest.fixture(scope="module")
def fitted():
    return Fitted()


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_without_compile_it_is_asked_for(method):
    with pytest.raises(ValueError, match=r"must call `compile\(\)`"):
        getattr(build(), method)(documents(2, 24))


def test_history_has_every_metric(fitted):
    expected = METRICS | {f"val_{name}" for name in METRICS} | UPDATES
    assert set(fitted.history) == expected
    for name, values in fitted.history.items():
        assert len(values) == 2, name
        assert np.isfinite(values).all(), name
    perplexity = np.exp(fitted.history["val_ce_loss"])
    np.testing.assert_allclose(fitted.history["val_perplexity"], perplexity, rtol=1e-5)
    # 5 documents in batches of 2, over 2 epochs, each with its own rollouts.
    assert len(fitted.batches) == 6
    assert len({logs["alignment"] for logs in fitted.batches}) == 6


def test_the_frozen_network_stays_frozen(fitted):
    model = fitted.model
    for before, after in zip(fitted.frozen_before, model.frozen_network.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert not model.frozen_network.trainable_variables
    moved = [
        np.abs(before - after).max()
        for before, after in zip(fitted.weights_before, model.causal_lm.get_weights())
    ]
    assert min(moved) > 0
    # Two slots for each trained variable and the iteration, no more.
    slots = 2 * len(model.causal_lm.trainable_variables) + 1
    assert len(model.optimizer.variables) == slots


def test_evaluate_repeats_and_leaves_training_alone(fitted):
    model = fitted.model
    seed = to_numpy(model._training_seed.state)
    held_out = documents(3, LENGTH, seed=1)
    first, second = (
        model.evaluate(held_out, batch_size=2, return_dict=True, verbose=0)
        for _ in range(2)
    )
    assert first == second
    assert set(first) == METRICS
    np.testing.assert_array_equal(to_numpy(model._training_seed.state), seed)
    assert first["ce_loss"] == pytest.approx(
        fitted.history["val_ce_loss"][-1], rel=1e-6
    )


def test_partial_batches_count_by_tokens(fitted):
    """Cross-entropy over 3 documents in batches of 2 is that of the tokens."""
    held_out = documents(3, LENGTH, seed=1)
    measured = fitted.model.evaluate(
        held_out, batch_size=2, return_dict=True, verbose=0
    )
    rollouts = fitted.model.rollout(held_out, seed=0)
    log_prob = to_numpy(fitted.model.score(held_out, rollouts)["document_log_prob"])
    assert measured["ce_loss"] == pytest.approx(-log_prob.mean(), rel=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"token_ids": self.rows[2 * index : 2 * index + 2]}


def streams(rows):
    """The same two batches, the second one short, from every kind of source."""
    import tensorflow as tf
    import torch

    yield "PyDataset", Batches(rows)
    yield "tf.data", tf.data.Dataset.from_tensor_slices(rows).batch(2)
    yield (
        "tf.data of dicts",
        tf.data.Dataset.from_tensor_slices({"token_ids": rows}).batch(2),
    )
    yield "DataLoader", torch.utils.data.DataLoader(torch.from_numpy(rows), 2)
    yield "generator", (rows[i : i + 2] for i in (0, 2))
    yield "generator of tuples", ((rows[i : i + 2],) for i in (0, 2))


def test_every_kind_of_stream_gives_the_same_batches(fitted):
    rows = documents(3, LENGTH)
    expected = list(adapter(fitted.model, rows, batch_size=2).get_numpy_iterator())
    assert expected[1]["padding_mask"].sum(axis=1).tolist() == [LENGTH, 0]
    for name, source in streams(rows):
        batches = adapter(fitted.model, source)
        read = list(batches.get_numpy_iterator())
        assert len(read) == 2, name
        assert batches.num_batches in {2, None}, name
        for ours, theirs in zip(read, expected):
            for key, value in theirs.items():
                np.testing.assert_array_equal(ours[key], value, err_msg=name)
                assert ours[key].dtype == value.dtype, name


def adapter(model, x, batch_size=None, shuffle=False):
    return token_batches(
        x,
        model._reader,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=0,
    )


def test_fit_on_streams(fitted):
    for name, source in streams(documents(4, LENGTH)):
        history = fitted.model.fit(source, steps_per_epoch=2, verbose=0).history
        assert np.isfinite(history["loss"]).all(), name
    fitted.model.fit(
        documents(4, LENGTH), batch_size=2, validation_split=0.5, verbose=0
    )


def test_every_backend_gets_its_own_kind_of_batch(fitted):
    batches = adapter(fitted.model, documents(3, LENGTH), batch_size=2)
    dataset = batches.get_tf_dataset()
    assert dataset.element_spec["token_ids"].shape == (2, LENGTH)
    # An iterator given up in the middle waits for it, up to a minute.
    assert dataset.options().autotune.enabled is False
    for source in (dataset, batches.get_torch_dataloader(), batches.get_jax_iterator()):
        assert len(list(source)) == 2
    assert token_batches(batches, None, None, False, 0) is batches


def test_shuffling_follows_the_seed(fitted):
    rows = documents(8, LENGTH)

    def epochs():
        batches = adapter(fitted.model, rows, batch_size=8, shuffle=True)
        for epoch in range(2):
            batches.begin_epoch(epoch)
            batches.on_epoch_begin()
            yield next(batches.get_numpy_iterator())["token_ids"]
            batches.on_epoch_end()

    first, second = list(epochs()), list(epochs())
    np.testing.assert_array_equal(first, second)
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(np.sort(first[0], axis=0), np.sort(rows, axis=0))


def test_same_seed_same_weights():
    def train(seed):
        model = build(seed=seed)
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(documents(4, LENGTH), batch_size=2, verbose=0)
        return model.causal_lm.get_weights()

    first, again, other = train(3), train(3), train(4)
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one, two)
    assert any((one != two).any() for one, two in zip(first, other))


def test_gradient_accumulation_updates_every_second_step():
    model = build()
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    moved = []
    start = model.causal_lm.get_weights()

    def record(batch, logs):
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        now = model.causal_lm.get_weights()
        moved.append(any((a != b).any() for a, b in zip(start, now)))

    history = model.fit(
        documents(4, LENGTH),
        batch_size=2,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=record)],
    ).history
    assert moved == [False, True]
    assert history["skipped_updates"] == [0]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it on PyTorch")
def test_steps_per_execution():
    model = build()
    model.compile(keras.optimizers.SGD(0.1), steps_per_execution=2)
    model.fit(documents(4, LENGTH), batch_size=2, verbose=0)
    assert int(to_numpy(model.optimizer.iterations)) == 2


@pytest.mark.slow
@pytest.mark.compiled
def test_run_eagerly():
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, context_length=2, num_samples=2, stride=9
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    logs = model.train_on_batch(documents(1, 4), return_dict=True)
    assert set(logs) == METRICS | UPDATES


def test_test_on_batch_takes_plain_documents(fitted):
    x = documents(2, LENGTH)
    logs = fitted.model.test_on_batch(x, return_dict=True)
    assert set(logs) == METRICS


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there it asks for devices")
def test_compiled_where_the_backend_compiles(fitted):
    assert fitted.model.jit_compile is (BACKEND == "jax")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice there")
@pytest.mark.parametrize("kind", ["CPU", "GPU", "TPU"])
def test_compiled_by_xla_on_accelerators_of_tensorflow(monkeypatch, kind):
    import tensorflow as tf

    devices = [
        tf.config.PhysicalDevice(f"/physical_device:{name}:0", name)
        for name in sorted({"CPU", kind})
    ]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: devices)
    model = build()
    model.compile("sgd")
    assert model.jit_compile is (kind != "CPU")
    for chosen in (True, False):
        model.compile("sgd", jit_compile=chosen)
        assert model.jit_compile is chosen


def test_default_optimizer():
    model = build()
    model.compile()
    assert isinstance(model.optimizer, keras.optimizers.AdamW)
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(1e-6)
    assert model.optimizer.global_clipnorm == 1.0


def test_rollouts_by_seed(fitted):
    model, x = fitted.model, documents(2, LENGTH)
    same = [to_numpy(model.rollout(x, seed=7)["token_ids"]) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    fresh = [to_numpy(model.rollout(x)["token_ids"]) for _ in range(2)]
    assert (fresh[0] != fresh[1]).any()


def test_losses_is_what_keras_says_it_is(fitted):
    assert type(fitted.model.losses) is list


def test_configurations_rebuild_every_part():
    model = build(
        reward=keras_ebft.FeatureMatchingReward(0.5, 0.25, "feature"),
        advantage="reinforce",
        policy_weight=0.7,
        ce_weight=0.2,
    )
    for part in (model.sampler, model.feature_network, model.reward):
        same = type(part).from_config(part.get_config())
        assert same.get_config() == part.get_config()
    config = model.get_config()
    config["causal_lm"] = model.causal_lm
    twin = keras_ebft.EBFTModel.from_config(
        {k: v for k, v in config.items() if k != "trainable"}
    )
    assert twin.get_config()["reward"] == config["reward"]
    assert (twin.advantage, *list(twin.objective.weights.values())[:2], twin.seed) == (
        "reinforce",
        0.7,
        0.2,
        0,
    )
    replay = keras_ebft.ReplaySampler(np.ones((1, 2, 3, 4), "int32"), stride=2)
    same = keras_ebft.ReplaySampler.from_config(replay.get_config())
    np.testing.assert_array_equal(same.token_ids, replay.token_ids)
    assert same.stride == 2


def test_adapter_class_is_what_fit_uses(fitted):
    assert isinstance(adapter(fitted.model, documents(2, LENGTH)), TokenBatches)


@pytest.mark.slow_compiled
def test_dropout_never_runs():
    """Neither in sampling nor in the pass that is trained."""

    def trained(dropout):
        causal_lm = family("GPT2", num_layers=1, dropout=dropout)
        model = build(causal_lm, ce_weight=0.5)
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(documents(2, LENGTH), batch_size=2, verbose=0)
        return flat(causal_lm.get_weights())

    np.testing.assert_array_equal(trained(0.5), trained(0.0))
