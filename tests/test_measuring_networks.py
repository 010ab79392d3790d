"""What measures feature matching is one network, and training does not move it."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, randomise, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.evaluation import FeatureMatching

pytestmark = pytest.mark.slow_compiled

X = documents(4, 16)


def build(**options):
    options.setdefault("feature_network", keras_ebft.FeatureNetwork(layers=(1,)))
    return keras_ebft.EBFTModel(
        llama(num_layers=2),
        keras_ebft.BlockSampler(
            rollout_length=2, stride=4, context_length=4, num_samples=3
        ),
        seed=0,
        **options,
    )


@pytest.fixture(scope="module")
def expected():
    return FeatureMatching(build())(X, batch_size=4)


def test_the_reference_model_is_not_measured(expected):
    """It shares the feature network's copy, which has one more output for it."""
    measured = FeatureMatching(build(kl_weight=0.1))(X, batch_size=4)
    assert measured == pytest.approx(expected, rel=1e-6)


LIVE = {
    "ema": {"feature_network": keras_ebft.FeatureNetwork(layers=(1,), ema_decay=0.5)},
    "critic": {"critic": keras_ebft.Critic(train_features=True)},
}


@pytest.mark.parametrize("kind", LIVE)
def test_a_feature_network_that_moves_is_copied_before_it_measures(expected, kind):
    model = build(**LIVE[kind])
    measure = FeatureMatching(model)
    assert measure(X, batch_size=4) == pytest.approx(expected, rel=1e-6)
    for variable in model.frozen_network.variables:
        variable.assign(0.5 * ops.convert_to_tensor(variable) + 0.1)
    assert measure(X, batch_size=4) == pytest.approx(expected, rel=1e-6)
    # Made now, it measures with the network as it is now.
    moved = FeatureMatching(model)(X, batch_size=4)
    assert moved["alignment@8"] != pytest.approx(expected["alignment@8"], rel=1e-3)


@pytest.mark.parametrize("kind", LIVE)
def test_training_moves_the_model_alone(kind):
    model = build(**LIVE[kind])
    measure = FeatureMatching(model)
    (measuring,) = measure._models.values()
    before = [to_numpy(v) for v in measuring.frozen_network.variables]
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(X, batch_size=4, epochs=2, verbose=0)
    after = [to_numpy(v) for v in measuring.frozen_network.variables]
    own = [to_numpy(v) for v in model.frozen_network.variables]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))
    assert not all(np.array_equal(a, b) for a, b in zip(own, after))


@keras.saving.register_keras_serializable("tests")
class Longest(keras_ebft.Reward):
    """A reward that measures nothing of its own."""

    diversity_weight = 0.0

    def __call__(self, generated, target, rollouts=None):
        reward = ops.sum(ops.cast(rollouts.alive, "float32"), axis=-1)
        zero = ops.zeros_like(reward)
        return {"alignment": reward, "diversity": zero, "reward": reward}

    def get_config(self):
        return {}


def test_a_reward_without_the_measure_does_not_keep_from_measuring(expected):
    assert FeatureMatching(build(reward=Longest()))(X, batch_size=4) == pytest.approx(
        expected, rel=1e-6
    )


def test_models_of_other_weights_differ(expected):
    model = build()
    measure = FeatureMatching(model)
    randomise(model.causal_lm, seed=3)
    assert measure(X, batch_size=4) != pytest.approx(expected, rel=1e-2)
