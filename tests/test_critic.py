"""The experimental critic: its loss, its own optimizer, and what it leaves alone."""

import keras
import numpy as np
import pytest
from helpers import documents, flat, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.objectives.critic import (
    PolicyAndCriticOptimizer,
    critic_accuracy,
    critic_loss,
)

SAMPLER = {"stride": 4, "context_length": 4}
X = documents(2, 14)
ROLLOUTS = documents(2 * 2 * 2, 3, seed=1).reshape(2, 2, 2, 3)

TRUE = np.array([[1.0, -2.0]])
GENERATED = np.array([[[0.5, -1.0], [1.0, 3.0], [0.9, 7.0]]])
MASK = np.array([[[1, 1], [1, 1], [1, 0]]])


def log_sigmoid(x):
    return -np.log1p(np.exp(-np.asarray(x, dtype="float64")))


def mean(*logits):
    return np.mean(log_sigmoid(logits))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("first", mean(0.5, -1.0) - mean(1.0, -2.0)),
        ("all", mean(0.5, 1.0, 0.9, -1.0, 3.0) - mean(1.0, 1.0, 1.0, -2.0, -2.0)),
        # 1.0 is the truth itself, 7.0 does not count.
        ("closest", mean(0.9, 3.0) - mean(1.0, -2.0)),
        (
            "only_different",
            mean(0.5, 0.9, -1.0, 3.0) - mean(1.0, 1.0, 1.0, -2.0, -2.0),
        ),
    ],
)
def test_loss_by_hand(selection, expected):
    arrays = (
        ops.convert_to_tensor(a, dtype="float32") for a in (TRUE, GENERATED, MASK)
    )
    found = float(to_numpy(critic_loss(*arrays, selection)))
    assert found == pytest.approx(expected, abs=1e-6)


def test_accuracy_by_hand():
    arrays = (
        ops.convert_to_tensor(a, dtype="float32") for a in (TRUE, GENERATED, MASK)
    )
    # Truths: right thrice, wrong twice; rollouts: one of five is known as such.
    assert float(to_numpy(critic_accuracy(*arrays))) == pytest.approx(4 / 10)


def train(causal_lm, weights, critic, epochs=1):
    causal_lm.set_weights(weights)
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,)),
        critic=critic,
        seed=0,
    )
    model.compile(keras.optimizers.SGD(0.1))
    history = model.fit(X, batch_size=2, epochs=epochs, verbose=0, shuffle=False)
    return model, history.history


@pytest.fixture(scope="module")
def policy():
    causal_lm = llama(num_layers=1)
    return causal_lm, causal_lm.get_weights()


@pytest.mark.slow_compiled
def test_a_probe_learns_and_leaves_the_policy_alone(policy):
    alone = train(*policy, None, epochs=6)[0].causal_lm.get_weights()
    critic = keras_ebft.Critic("all", keras.optimizers.Adam(0.1))
    model, history = train(*policy, critic, epochs=6)
    # Within rounding: with the probe XLA compiles another program.
    found = flat(model.causal_lm.get_weights())
    np.testing.assert_allclose(found, flat(alone), rtol=0, atol=1e-6)
    assert history["critic_loss"][-1] < history["critic_loss"][0] - 0.1
    assert history["critic_accuracy"][-1] > 0.6
    # One optimizer for each: no momentum for the policy, two slots for the head.
    assert isinstance(critic.optimizer, keras.optimizers.Adam)
    assert len(critic.optimizer.variables) == 2 + 2 * 2
    assert float(to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.1)
    model.optimizer.learning_rate = 0.05
    rate = model.optimizer.policy_optimizer.learning_rate
    assert float(to_numpy(rate)) == pytest.approx(0.05)
    assert not model.frozen_network.trainable_variables


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_no_gradient_of_a_probe_reaches_the_policy(policy, ema_decay):
    """Also where features follow the policy, which JAX does within the step."""
    causal_lm, weights = policy
    trained = []
    for critic in (None, keras_ebft.Critic("all", keras.optimizers.SGD(0.1))):
        causal_lm.set_weights(weights)
        model = keras_ebft.EBFTModel(
            causal_lm,
            keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER),
            keras_ebft.FeatureNetwork(layers=(1,), ema_decay=ema_decay),
            critic=critic,
            seed=0,
        )
        if critic is not None:
            kernel = model.critic_head.weights[0]
            kernel.assign(np.random.default_rng(3).normal(size=kernel.shape))
        model.compile(keras.optimizers.SGD(1.0))
        model.fit(X, batch_size=2, verbose=0)
        trained.append(flat(causal_lm.get_weights()))
    alone, beside = trained
    assert np.abs(alone - flat(weights)).max() > 0.01
    np.testing.assert_allclose(beside, alone, rtol=0, atol=1e-5)


def test_the_models_seed_decides_how_the_head_starts(policy):
    """The same seed gives the same training: unseeded, each run had another probe."""

    def head(seed):
        critic = keras_ebft.Critic("all", "sgd")
        options = {"critic": critic, "seed": seed}
        sampler = keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER)
        model = keras_ebft.EBFTModel(policy[0], sampler, **options)
        return model.critic_head.get_weights()[0]

    np.testing.assert_array_equal(head(0), head(0))
    assert np.abs(head(0) - head(1)).max() > 0.01


@pytest.mark.not_on_tensorflow
def test_features_learn_with_the_critic(policy):
    causal_lm, weights = policy
    critic = keras_ebft.Critic("closest", "sgd", train_features=True)
    causal_lm.set_weights(weights)
    layer = causal_lm.backbone.transformer_layers[0]
    before = flat(layer.get_weights())
    probe, _ = train(causal_lm, weights, keras_ebft.Critic("closest", "sgd"))
    learner, _ = train(causal_lm, weights, critic)
    frozen, learned = (
        flat(model.frozen_network.get_layer(layer.name).get_weights())
        for model in (probe, learner)
    )
    np.testing.assert_array_equal(frozen, before)
    assert np.abs(learned - before).max() > 1e-7
    assert len(learner.optimizer.policy_optimizer._trainable_variables) == len(
        causal_lm.trainable_variables
    )
    same = keras_ebft.Critic.from_config(critic.get_config())
    assert same.get_config() == critic.get_config()


@pytest.mark.parametrize("scaled", [False, True])
def test_averaged_weights_are_applied_beside_a_critic(scaled):
    """`use_ema` of either optimizer, within loss scaling too."""
    policy, head = (keras.Variable([1.0]) for _ in range(2))
    ema = {"use_ema": True, "ema_momentum": 0.5}
    optimizer = PolicyAndCriticOptimizer(
        keras.optimizers.SGD(1.0, **ema), keras.optimizers.SGD(2.0, **ema), [head]
    )
    optimizer.build([head, policy])
    for _ in range(2):
        one = ops.ones((1,))
        optimizer.apply([one, one], [head, policy])
    assert [float(v.numpy()[0]) for v in (policy, head)] == [-1.0, -3.0]
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 1.0)
    optimizer.finalize_variable_values([head, policy])
    # 0.5 * (0, -1) + 0.5 * (-1, -3)
    assert [float(v.numpy()[0]) for v in (policy, head)] == [-0.5, -2.0]


@pytest.mark.slow_compiled
@pytest.mark.parametrize(
    "own_scale", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_critic_with_scaled_losses_saves_and_loads(own_scale, tmp_path):
    """Keras scales losses under `mixed_float16` by an optimizer around the two."""
    optimizer = keras.optimizers.Adam(0.01)
    if own_scale:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 64.0)
    model = keras_ebft.EBFTModel(
        llama(num_layers=1, dtype="mixed_float16"),
        keras_ebft.ReplaySampler(ROLLOUTS, **SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,)),
        critic=keras_ebft.Critic(optimizer=keras.optimizers.Adam(0.1)),
        seed=0,
    )
    model.compile(optimizer)
    model.train_on_batch(X)
    scaled = model.optimizer
    assert isinstance(scaled, keras.optimizers.LossScaleOptimizer)
    assert float(to_numpy(scaled.dynamic_scale)) == (64.0 if own_scale else 2.0**15)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name in ("variables", "trainable_variables"):
        one, two = getattr(model, name), getattr(loaded, name)
        assert [v.shape for v in one] == [v.shape for v in two]
    for one, two in zip(
        [*model.variables, *model.optimizer.variables],
        [*loaded.variables, *loaded.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(two), one.path)
    assert model.train_on_batch(X) == loaded.train_on_batch(X)
    np.testing.assert_array_equal(
        flat(model.causal_lm.get_weights()), flat(loaded.causal_lm.get_weights())
    )
