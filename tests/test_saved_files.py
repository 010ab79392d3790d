"""Files that earlier versions wrote load, and say and train what they did.

`tests/data/saved` holds what 0.1.0 wrote on PyTorch, while every module still lay in
one folder: a saved model with a sum of rewards and a critic, and a checkpoint of
training with adapters on given rollouts, interrupted in its second epoch.
"""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft

DATA = Path(__file__).parent / "data" / "saved"
LENGTH = 14
ROLLOUTS = documents(2 * 2 * 2, 3, seed=1).reshape(2, 2, 2, 3)


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "expected_0.1.0.npz")


def test_a_saved_model_loads(expected):
    model = keras.saving.load_model(DATA / "model_0.1.0.keras")
    assert isinstance(model.reward, keras_ebft.RewardSum)
    assert isinstance(model.critic, keras_ebft.Critic)
    assert isinstance(model.optimizer.policy_optimizer, keras.optimizers.Adam)
    assert int(to_numpy(model.optimizer.iterations)) == 2
    x = documents(2, LENGTH, seed=9)
    found = {**model.score(x, ROLLOUTS), **model.rewards(x, ROLLOUTS)}
    for name in ("log_prob", "advantage"):
        np.testing.assert_allclose(
            to_numpy(found[name]), expected[name], rtol=0, atol=1e-5
        )


def test_a_checkpoint_resumes(expected, tmp_path):
    """The rest of the second epoch and the third: the weights it would have had."""
    path = tmp_path / "latest.weights.h5"
    shutil.copy(DATA / "checkpoint_0.1.0.weights.h5", path)
    causal_lm = llama(
        num_layers=1,
        hidden_dim=8,
        intermediate_dim=8,
        num_query_heads=2,
        num_key_value_heads=1,
    )
    causal_lm.backbone.enable_lora(2)
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.ReplaySampler(ROLLOUTS, stride=4, context_length=4),
        keras_ebft.FeatureNetwork(layers=(1,)),
        ce_weight=0.1,
        seed=5,
    )
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(
        documents(4, LENGTH),
        batch_size=2,
        epochs=3,
        verbose=0,
        callbacks=[keras_ebft.TrainingCheckpoint(path)],
    )
    assert history.epoch == [1, 2]
    assert len(model.trainable_variables) == 4
    for index, variable in enumerate(model.trainable_variables):
        np.testing.assert_allclose(
            to_numpy(variable), expected[f"weight_{index}"], rtol=0, atol=1e-4
        )
