"""Every term of the objective against autodiff through whole plain sequences."""

import functools

import numpy as np
import pytest
from helpers import documents, flat, llama, to_numpy, value_and_gradients
from keras import ops
from plain import Plain

import keras_ebft

LENGTH = 16
TEMPERATURE = 0.7
SAMPLER = {
    "rollout_length": 3,
    "stride": 4,
    "context_length": 4,
    "num_samples": 2,
    "temperature": TEMPERATURE,
}
X = documents(2, LENGTH)
ANSWERS = np.zeros((2, LENGTH), dtype=bool)
ANSWERS[0, 5:9] = ANSWERS[1, 9:] = True
# Row 0 is two documents of 8 tokens.
SEGMENTS = np.where(np.arange(LENGTH) < 8, 1, [[2], [1]]).astype("int32")
INPUTS = {
    "plain": {"token_ids": X},
    "answers": {"token_ids": X, "answer_mask": ANSWERS},
    "packed": {"token_ids": X, "segment_ids": SEGMENTS},
}
COUNTED = {
    "plain": np.ones((2, LENGTH - 1), dtype=bool),
    "answers": ANSWERS[:, 1:],
    "packed": SEGMENTS[:, 1:] == SEGMENTS[:, :-1],
}

# name -> (options of the model, pooling, which inputs)
CASES = {
    "defaults": ({}, "last_token", "plain"),
    "answers, sequence, k2, entropy": (
        {
            "policy_loss": "sequence",
            "kl_weight": 0.5,
            "entropy_weight": 0.1,
            "ce_weight": 0.3,
        },
        "concat",
        "answers",
    ),
    "packed, group_norm, k1": (
        {
            "advantage": "group_norm",
            "kl_weight": 0.2,
            "kl_estimator": "k1",
            "ce_weight": 0.3,
            "policy_weight": 0.4,
        },
        "mean",
        "packed",
    ),
    "a reward per token, k3": (
        {"advantage": "reinforce", "kl_weight": 0.5, "kl_estimator": "k3"},
        "token",
        "answers",
    ),
}


@functools.cache
def policy():
    """One policy for all cases, and the weights each of them starts from."""
    causal_lm = llama(num_layers=1)
    return causal_lm, causal_lm.get_weights()


def build(pooling, **options):
    """A model whose policy has moved away from its initial weights."""
    causal_lm, initial = policy()
    causal_lm.set_weights(initial)
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(**SAMPLER),
        keras_ebft.FeatureNetwork(layers=(1,), pooling=pooling),
        seed=0,
        **options,
    )
    random = np.random.default_rng(7)
    causal_lm.set_weights(
        [w + 0.05 * random.normal(size=w.shape) for w in causal_lm.get_weights()]
    )
    return model


def expected_loss(model, plain, outputs, counted, reference):
    """The objective as the paper writes it down."""
    objective = model.objective
    mask = outputs["mask"].astype("float32")
    log_prob, entropy = plain.log_prob_and_entropy(model.causal_lm)
    difference = log_prob - ops.stop_gradient(log_prob)
    if objective.policy_loss == "sequence":
        number = np.maximum(mask.sum(axis=-1, keepdims=True), 1.0)
        difference = ops.sum(tensor(mask / number) * difference, -1, keepdims=True)
    weights = policy_weights(plain, outputs, mask)
    loss = -objective.policy_weight * ops.sum(ops.exp(difference) * tensor(weights))
    mean = tensor(mask / mask.sum())
    if objective.kl_weight:
        d = log_prob - tensor(reference)
        kl = {
            "k1": lambda: d,
            "k2": lambda: d * d / 2,
            "k3": lambda: ops.exp(-d) - 1 + d,
        }[objective.kl_estimator]()
        loss = loss + objective.kl_weight * ops.sum(ops.clip(kl, -10.0, 10.0) * mean)
    if objective.entropy_weight:
        loss = loss - objective.entropy_weight * ops.sum(entropy * mean)
    if objective.ce_weight:
        ce = plain.cross_entropy(model.causal_lm, counted)
        loss = loss + objective.ce_weight * ce
    return loss


def policy_weights(plain, outputs, mask):
    """What multiplies each ratio: advantages over the size of their sequence."""
    advantage = outputs["advantage"]
    if advantage.ndim == 3:
        advantage = advantage[..., None]
    gain = np.where(mask > 0, advantage, 0.0)
    weights, sequences = np.zeros_like(mask), 0
    for b, j in np.ndindex(mask.shape[:2]):
        own = plain.starts[b, np.maximum(outputs["anchors"][b], 1) - 1]
        for first in np.unique(own):
            chosen = mask[b, j] * (own == first)[:, None]
            if chosen.sum():
                sequences += 1
                weights[b, j] += gain[b, j] * chosen / chosen.sum()
    return weights / sequences


def tensor(values):
    return ops.convert_to_tensor(values, dtype="float32")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.numbers] if "packed" in name else [])
        for name in CASES
    ],
)
def test_loss_and_gradient(name):
    options, pooling, kind = CASES[name]
    model = build(pooling, **options)
    x = INPUTS[kind]
    rollouts = model.rollout(x, seed=1)
    outputs = {k: to_numpy(v) for k, v in rollouts.items()}
    outputs |= {k: to_numpy(v) for k, v in model.rewards(x, rollouts).items()}
    starts = None
    if kind == "packed":
        starts = np.where(SEGMENTS == 2, 8, 0).astype("int32")
    plain = Plain(X, outputs["token_ids"], outputs["anchors"], TEMPERATURE, starts)

    moved = model.causal_lm.get_weights()
    model.causal_lm.set_weights(policy()[1])
    reference = to_numpy(plain.log_prob_and_entropy(model.causal_lm)[0])
    model.causal_lm.set_weights(moved)

    def expected():
        return expected_loss(model, plain, outputs, COUNTED[kind], reference)

    def ours():
        return model.loss_terms(x, rollouts)["loss"]

    assert outputs["mask"].any()
    assert np.abs(outputs["advantage"]).max() > 0
    (value, one), (target, two) = (
        value_and_gradients(loss, model.trainable_variables)
        for loss in (ours, expected)
    )
    assert value == pytest.approx(target, rel=2e-5, abs=1e-6)
    one, two = flat(one), flat(two)
    assert np.linalg.norm(two) > 1e-2
    assert np.linalg.norm(one - two) < 5e-5 * np.linalg.norm(two)
