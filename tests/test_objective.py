"""Weights, schedules, several updates per rollout, and SFT as a setting."""

import keras
import numpy as np
import pytest
from helpers import documents, flat, gradients, llama, set_random_seed, to_numpy
from keras import ops
from plain import Plain

import keras_ebft
from keras_ebft.networks import adapters

SAMPLER = {"stride": 4, "context_length": 4, "temperature": 0.7}
X = documents(1, 14)
ROLLOUTS = documents(4, 3, seed=1).reshape(1, 2, 2, 3)
ANCHORS = np.array([[4, 8]])

# What supervised training logs.
SUPERVISED = {"loss", "ce_loss", "perplexity", "skipped_updates", "grad_norm"}


@pytest.fixture(scope="module")
def policy():
    causal_lm = llama(num_layers=1)
    return causal_lm, causal_lm.get_weights()


def build(policy, **options):
    causal_lm, initial = policy
    causal_lm.set_weights(initial)
    return keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
        **options,
    )


def fit(model, x=X, **options):
    model.compile(keras.optimizers.SGD(0.3))
    return model.fit(x, batch_size=len(X), verbose=0, **options).history


@pytest.mark.parametrize(
    "kind", ["token", pytest.param("sequence", marks=pytest.mark.on_torch)]
)
def test_several_updates_per_rollout(policy, kind):
    """Two clipped steps against the same two from plain sequences."""
    model = build(
        policy, updates_per_rollout=2, clip_range=(0.05, 0.1), policy_loss=kind
    )
    causal_lm, initial = policy
    advantage = to_numpy(model.rewards(X, ROLLOUTS)["advantage"])[..., None]
    plain = Plain(X, ROLLOUTS, ANCHORS, 0.7)
    old = to_numpy(plain.log_prob_and_entropy(causal_lm)[0])
    ratios = []

    def ratio():
        difference = plain.log_prob_and_entropy(causal_lm)[0] - tensor(old)
        if kind == "sequence":
            mean = ops.mean(difference, axis=-1, keepdims=True)
            difference = ops.broadcast_to(mean, difference.shape)
        return ops.exp(difference)

    def loss():
        r = ratio()
        low = ops.minimum(
            r * tensor(advantage), ops.clip(r, 0.95, 1.1) * tensor(advantage)
        )
        return -ops.mean(low)

    for _ in range(2):
        ratios.append(to_numpy(ratio()))
        steps = gradients(loss, causal_lm.trainable_variables)
        for variable, step in zip(causal_lm.trainable_variables, steps):
            variable.assign(to_numpy(variable) - 0.3 * step)
    expected = flat(causal_lm.get_weights())
    assert (np.abs(ratios[0] - 1) < 1e-5).all()
    outside = (ratios[1] < 0.95) | (ratios[1] > 1.1)
    assert outside.any() and not outside.all(), "the second step clips some"

    causal_lm.set_weights(initial)
    fit(model)
    moved = flat(causal_lm.get_weights())
    size = np.linalg.norm(expected - flat(initial))
    assert np.linalg.norm(moved - expected) < 1e-4 * size
    assert int(to_numpy(model.optimizer.iterations)) == 2
    model.evaluate(X, batch_size=1, verbose=0)


def test_weights_follow_their_schedules(policy):
    """Weight 1 in the first step, 0 in the second: the policy moves once."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [1.0, 0.0])
    model = build(policy, policy_weight=schedule)
    weights = [model.causal_lm.get_weights()]
    for _ in range(2):
        fit(model)
        weights.append(model.causal_lm.get_weights())
    assert np.linalg.norm(flat(weights[1]) - flat(weights[0])) > 1e-4
    np.testing.assert_array_equal(flat(weights[2]), flat(weights[1]))
    config = model.objective.get_config()
    rebuilt = keras.saving.deserialize_keras_object(config["policy_weight"])
    assert rebuilt.get_config() == schedule.get_config()


def test_kl_is_measured_and_starts_at_zero(policy):
    model = build(policy, kl_weight=0.1, ce_weight=0.5)
    first, second = fit(model), fit(model)
    assert first["kl"][0] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"][0] > 1e-6
    # The reference is the feature network's own copy, not a second one.
    assert len(model.frozen_networks) == 1


@pytest.mark.on_torch
def test_the_reference_of_trained_adapters_is_their_base(caplog, tmp_path):
    """And merged into the base they are the model as it is."""
    set_random_seed(0)
    causal_lm = llama(num_layers=1)
    causal_lm.backbone.enable_lora(2)

    def measured():
        caplog.clear()
        with caplog.at_level("WARNING", logger="keras_ebft"):
            model = build((causal_lm, causal_lm.get_weights()), kl_weight=0.1)
        model.compile(keras.optimizers.SGD(0.0))
        said = [r for r in caplog.records if "trained already" in r.getMessage()]
        return model.evaluate(X, return_dict=True, verbose=0)["kl"], len(said)

    divergence, said = measured()
    assert (divergence, said) == (pytest.approx(0.0, abs=1e-6), 0)
    for layer in adapters.adapted_layers(causal_lm.backbone):
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.3))
    divergence, said = measured()
    assert said == 1
    assert divergence > 1e-3
    policy = to_numpy(log_prob(causal_lm))
    with adapters.switched_off(adapters.adapted_layers(causal_lm.backbone)):
        apart = policy - to_numpy(log_prob(causal_lm))
    assert divergence == pytest.approx(np.mean(apart**2) / 2, rel=1e-3)
    causal_lm.save_weights(tmp_path / "merged.weights.h5")
    causal_lm.load_weights(tmp_path / "merged.weights.h5")
    assert np.abs(to_numpy(log_prob(causal_lm)) - policy).max() < 1e-5
    assert measured() == (pytest.approx(0.0, abs=1e-6), 0)


def log_prob(causal_lm):
    return Plain(X, ROLLOUTS, ANCHORS, 0.7).log_prob_and_entropy(causal_lm)[0]


def test_the_reference_stays_where_features_move(policy):
    model = keras_ebft.EBFTModel(
        policy[0],
        keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,), ema_decay=0.5),
        kl_weight=0.1,
        seed=0,
    )
    taps, reference = model.frozen_networks
    before = reference.get_weights()
    fit(model, epochs=2)
    for one, two in zip(before, reference.get_weights()):
        np.testing.assert_array_equal(one, two)
    assert np.abs(flat(taps.get_weights()) - flat(before)[: taps.count_params()]).max()


@pytest.mark.parametrize(
    ("options", "updates"), [({}, 4), ({"policy_weight": 0.0, "ce_weight": 1.0}, 2)]
)
def test_batches_are_counted_not_updates(policy, options, updates):
    """Without rollouts there is one update of a batch, whatever is asked for."""
    model = build(policy, updates_per_rollout=2, **options)
    fit(model, epochs=2)
    assert int(to_numpy(model.optimizer.iterations)) == updates
    assert model.steps_trained == 2


@pytest.mark.parametrize("reduction", ["mean_with_sample_weight", None])
def test_sft_is_what_kerashub_fits(policy, reduction):
    """One SGD step, against `CausalLM.fit` on shifted labels.

    By default Keras divides by all places, this library by the tokens that count.
    """
    causal_lm, initial = policy
    x, mask = documents(2, 10), np.ones((2, 10), dtype=bool)
    mask[1, 6:] = False
    factor = 1.0 if reduction else 2 * 9 / (9 + 5)
    causal_lm.set_weights(initial)
    options = {} if reduction is None else {"reduction": reduction}
    causal_lm.compile(
        optimizer=keras.optimizers.SGD(0.3 * factor),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options),
    )
    inputs = {"token_ids": x[:, :-1], "padding_mask": mask[:, :-1]}
    weights = mask[:, 1:].astype("float32")
    causal_lm.fit(
        inputs,
        x[:, 1:],
        sample_weight=weights,
        batch_size=2,
        shuffle=False,
        verbose=0,
    )
    expected = flat(causal_lm.get_weights())

    causal_lm.set_weights(initial)
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.SGD(0.3))
    rows = {"token_ids": x, "padding_mask": mask}
    history = model.fit(rows, batch_size=2, shuffle=False, verbose=0).history
    moved = flat(causal_lm.get_weights())
    size = np.linalg.norm(expected - flat(initial))
    assert np.linalg.norm(moved - expected) < 1e-5 * size
    # No rollouts: nothing of them is measured, and no copy of the model is made.
    assert set(history) == SUPERVISED
    assert model.frozen_networks == []
    assert model.frozen_network is None
    with pytest.raises(ValueError, match="policy_weight"):
        model.rewards(rows, ROLLOUTS)
    assert set(model.loss_terms(rows, None)) == {"ce_loss", "loss"}


def test_sft_reads_documents_of_any_length(policy):
    model = keras_ebft.EBFTModel.sft(policy[0], seed=0)
    model.compile()
    assert np.isfinite(model.fit(documents(1, 3), verbose=0).history["ce_loss"][0])


def tensor(values):
    return ops.convert_to_tensor(values, dtype="float32")


def test_nothing_follows_the_policy_where_nothing_is_matched():
    network = keras_ebft.FeatureNetwork(layers=(1,), ema_decay=0.5)
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), feature_network=network)
    model.compile("sgd")
    history = model.fit(documents(2, 8), verbose=0).history
    assert set(history) == SUPERVISED
