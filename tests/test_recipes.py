"""The authors' settings by name."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, randomise, to_numpy

import keras_ebft
from keras_ebft import recipes

# Settings, and models that the other tests train on every backend.
pytestmark = pytest.mark.on_torch

X = documents(2, 24)
CODE = {"rollout_length": 8, "stride": 8, "context_length": 8}
TRANSLATION = {"rollout_length": 4, "stride": 2, "context_length": 4}


@pytest.mark.parametrize(
    ("name", "blocks", "pooling"),
    [
        ("qa_code", CODE, "last_token"),
        ("unstructured_code", CODE, "last_token"),
        ("translation", TRANSLATION, "mean"),
    ],
)
def test_settings_of_the_authors(name, blocks, pooling):
    recipe = getattr(recipes, name)()
    config = recipe.sampler.get_config()
    assert {**blocks, "num_samples": 4, "temperature": 0.6}.items() <= config.items()
    features = recipe.feature_network
    assert (features.pooling, features.mode) == (pooling, "concat")
    assert features.layers == (0.25, 0.5, 0.75)
    reward = recipe.reward.get_config()
    assert (reward["whitening"], reward["normalize"]) == ("rollout", "token")
    assert (recipe.length, recipe.batch_size, recipe.passes) == (1024, 16, 2)
    assert recipe.options["ce_weight"] == 0.03
    assert recipe.options["advantage"] == "rloo"


def test_what_their_runs_vary():
    recipe = recipes.translation(ce_weight=0.1, diversity_weight=0.5, whitening=None)
    assert recipe.options["ce_weight"] == 0.1
    assert recipe.reward.diversity_weight == 0.5
    assert recipe.reward.whitening is None
    with pytest.raises(ValueError, match=r"whitening.*'no'"):
        recipes.qa_code(whitening="no")
    with pytest.raises(ValueError, match=r"ce_weight.*-1"):
        recipes.qa_code(ce_weight=-1)


def test_the_rate_rises_for_3_percent_of_the_steps_and_stays():
    optimizer = recipes.qa_code().optimizer(200, learning_rate=0.6)
    schedule = optimizer._learning_rate
    rates = [float(to_numpy(schedule(step))) for step in (0, 3, 6, 7, 100, 200, 500)]
    np.testing.assert_allclose(rates, [0, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6], rtol=1e-6)
    config = optimizer.get_config()
    assert (config["beta_1"], config["beta_2"]) == (0.9, 0.95)
    assert (config["weight_decay"], config["global_clipnorm"]) == (0.0, 1.0)
    for steps in (0, 1.5):
        with pytest.raises((TypeError, ValueError), match="steps"):
            recipes.qa_code().optimizer(steps)


def test_features_of_a_run_that_starts_from_a_checkpoint_are_the_bases():
    base, checkpoint = llama(), randomise(llama(), seed=7)
    expected = keras_ebft.EBFTModel(base, **recipes.qa_code().options, seed=0)
    rollouts = expected.rollout(X, seed=0)
    wanted = to_numpy(expected.features(X, rollouts)[0])
    for given in (base, base.backbone):
        recipe = recipes.qa_code(base=given)
        model = keras_ebft.EBFTModel(checkpoint, **recipe.options, seed=0)
        found = to_numpy(model.features(X, rollouts["token_ids"])[0])
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    own = keras_ebft.EBFTModel(checkpoint, **recipes.qa_code().options, seed=0)
    assert np.abs(to_numpy(own.features(X, rollouts)[0]) - wanted).max() > 0.01


def test_a_recipe_trains():
    causal_lm = llama(num_layers=1)
    recipe = recipes.translation()
    model = keras_ebft.EBFTModel(causal_lm, **recipe.options, seed=0)
    model.compile(recipe.optimizer(2, learning_rate=1e-3))
    assert isinstance(model.optimizer, keras.optimizers.AdamW)
    before = causal_lm.get_weights()
    model.fit(X, batch_size=1, verbose=0)
    assert any((a != b).any() for a, b in zip(before, causal_lm.get_weights()))
