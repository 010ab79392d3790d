"""What a block may depend on, and what padding may change: nothing."""

import numpy as np
import pytest
from helpers import documents, flat, gradients, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.backend.runtime import compiled
from keras_ebft.layout.documents import read_documents
from keras_ebft.training.batches import as_batch

LENGTH = 22


@pytest.fixture(scope="module")
def model():
    return build()


def build(**options):
    sampler = keras_ebft.BlockSampler(
        rollout_length=3, stride=4, context_length=4, num_samples=2
    )
    return keras_ebft.EBFTModel(
        llama(),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1, 2)),
        seed=0,
        **options,
    )


def everything(model, prompt, rollout_ids):
    """Log-probabilities, features and rewards of every block."""
    generated, target = model.features(prompt, rollout_ids)
    return {
        "log_prob": to_numpy(model.score(prompt, rollout_ids)["log_prob"]),
        "generated": to_numpy(generated),
        "target": to_numpy(target),
    }


def rollouts_of(model, prompt, seed=5):
    return to_numpy(model.rollout(prompt, seed=seed)["token_ids"])


@pytest.mark.numbers
def test_sampled_tokens_equal_one_block_at_a_time(model):
    prompt = documents(1, LENGTH)
    uniform = np.random.default_rng(1).random((1, 2, 4, 3)).astype("float32")
    anchors = np.array([[4, 8, 12, 16]], dtype="int32")
    np.testing.assert_array_equal(model.sampler.geometry(LENGTH).anchors, anchors[0])
    token_ids = _sample(model._step, prompt, anchors, uniform)
    for block in (0, 1, 3):
        anchor = anchors[0, block]
        row = prompt[:, : anchor + 3].copy()
        row[:, anchor:] = 0
        one = _sample(
            model._step, row, anchors[:, [block]], uniform[:, :, block : block + 1]
        )
        np.testing.assert_array_equal(one[:, :, 0], token_ids[:, :, block])


def _sample(step, prompt, anchors, uniform):
    def rollout(token_ids, anchors, uniform):
        batch = as_batch({"token_ids": token_ids, "anchors": anchors})
        read = read_documents(batch)
        return step.sample(read, step.read(read), (uniform, None)).token_ids

    run = compiled(rollout, lambda: step.causal_lm.variables)
    return to_numpy(
        run(*(ops.convert_to_tensor(v) for v in (prompt, anchors, uniform)))
    )


def test_tokens_after_an_anchor_change_nothing_in_its_rollouts(model):
    prompt = documents(1, LENGTH)
    changed = prompt.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 31
    before, after = rollouts_of(model, prompt), rollouts_of(model, changed)
    np.testing.assert_array_equal(before[:, :, :3], after[:, :, :3])
    assert (before[:, :, 3] != after[:, :, 3]).any()

    first, second = (everything(model, p, before) for p in (prompt, changed))
    for name in ("log_prob", "generated"):
        np.testing.assert_array_equal(first[name][:, :, :3], second[name][:, :, :3])
        assert (first[name][:, :, 3] != second[name][:, :, 3]).any()


@pytest.mark.parametrize("axis", ["block", "sample"])
def test_other_blocks_and_samples_change_nothing(model, axis):
    prompt = documents(1, LENGTH)
    before = rollouts_of(model, prompt)
    other = (slice(None), slice(None), 1) if axis == "block" else (slice(None), 1)
    after = before.copy()
    after[other] = (after[other] + 1) % 31
    first, second = (everything(model, prompt, r) for r in (before, after))
    for name in ("log_prob", "generated"):
        same = np.ones(before.shape[:3], dtype=bool)
        same[other] = False
        np.testing.assert_array_equal(first[name][same], second[name][same])
        assert (first[name][~same] != second[name][~same]).any()


@pytest.mark.slow_compiled
@pytest.mark.parametrize("length", [7, 10, 13])
def test_any_length(model, length):
    """Context 4, rollouts of 3, stride 4: one block up to 10, two from 11."""
    prompt = documents(2, length)
    rollouts = model.rollout(prompt, seed=0)
    assert rollouts["token_ids"].shape == (2, 2, 1 + (length >= 11), 3)
    generated, target = model.features(prompt, rollouts)
    assert generated.shape == (2, 2, 1 + (length >= 11), 1, 32)
    assert np.isfinite(to_numpy(generated)).all()
    assert np.isfinite(to_numpy(target)).all()


@pytest.mark.slow_compiled
def test_trailing_tokens_are_context_only(model):
    prompt = documents(1, 14)
    rollouts = rollouts_of(model, prompt)
    shorter = everything(model, prompt[:, :11], rollouts)
    longer = everything(model, prompt, rollouts)
    for name, value in shorter.items():
        np.testing.assert_allclose(value, longer[name], atol=5e-6)


def test_padding_contributes_exactly_nothing():
    """A short document and a row of padding, against the short document alone."""
    model = build(ce_weight=0.3)
    prompt = documents(1, 15)
    rollouts = rollouts_of(model, prompt)
    blocks = rollouts.shape[2]

    padded = documents(2, LENGTH, seed=9)
    padded[0, :15] = prompt[0]
    mask = np.zeros(padded.shape, dtype=bool)
    mask[0, :15] = True
    more = documents(2 * 2 * 4, 3, seed=8).reshape(2, 2, 4, 3)
    assert more.shape[2] > blocks, "dead blocks in a live row"
    more[0, :, :blocks] = rollouts[0]
    with_padding = {"token_ids": padded, "padding_mask": mask}

    def losses(x, rollout_ids):
        values = model.loss_terms(x, rollout_ids)
        return {name: float(to_numpy(value)) for name, value in values.items()}

    alone, together = losses(prompt, rollouts), losses(with_padding, more)
    assert alone == pytest.approx(together, rel=2e-6, abs=1e-6)
    rewards = {k: to_numpy(v) for k, v in model.rewards(with_padding, more).items()}
    for name, value in model.rewards(prompt, rollouts).items():
        np.testing.assert_allclose(
            rewards[name][:1, :, :blocks], to_numpy(value), atol=1e-5
        )
        assert not rewards[name][:, :, blocks:].any()
        assert not rewards[name][1].any()

    def gradient(x, rollout_ids):
        return flat(
            gradients(
                lambda: model.loss_terms(x, rollout_ids)["loss"],
                model.trainable_variables,
            )
        )

    one, two = gradient(prompt, rollouts), gradient(with_padding, more)
    assert np.linalg.norm(one - two) < 2e-5 * np.linalg.norm(one)
    # What stands in padding has no influence at all.
    padded[0, 15:] = (padded[0, 15:] + 1) % 31
    padded[1] = (padded[1] + 1) % 31
    more[1] = (more[1] + 1) % 31
    np.testing.assert_array_equal(two, gradient(with_padding, more))
