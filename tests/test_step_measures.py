"""Measures of a step beside rewards: tokens, blocks, gradients, time; and by steps."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft
from keras_ebft.backend.updates import gradient_norm
from keras_ebft.callbacks import Measure, Throughput
from keras_ebft.evaluation import PairedFeatureMatching
from keras_ebft.training import timing

X = documents(3, 12)
# Blocks at 4 and 8, of 3 tokens.
GEOMETRY = {"rollout_length": 3, "stride": 4, "context_length": 4}
TRUTH = np.stack([X[:, 4:7], X[:, 8:11]], axis=1)


def rows():
    """The last of them is shorter and has one block."""
    mask = np.ones((3, 12), bool)
    mask[2, 8:] = False
    return {"token_ids": X * mask, "padding_mask": mask}


def replaying(written, **options):
    """A model whose rollouts are given, `[B, n, K, G]`."""
    sampler = keras_ebft.ReplaySampler(written, **GEOMETRY, **options)
    model = keras_ebft.EBFTModel(
        llama(num_layers=1),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1,)),
        keras_ebft.FeatureMatchingReward(whitening=None),
        seed=0,
    )
    model.compile(keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def measured():
    """Of four rollouts in two samples, one token each is another than the true one."""
    written = np.repeat(TRUTH[:, None], 2, axis=1)
    written[:, 1, :, 2] = (written[:, 1, :, 2] + 1) % 31
    stop = int(TRUTH[0, 1, 1])
    model = replaying(written, stop_token_ids=(stop,))
    found = model.evaluate(rows(), batch_size=3, return_dict=True, verbose=0)
    return written, stop, found


def test_tokens_that_are_the_true_ones(measured):
    written, stop, found = measured
    same = counted = 0
    for row, blocks in ((0, 2), (1, 2), (2, 1)):
        for sample in range(2):
            for block in range(blocks):
                for token, true in zip(written[row, sample, block], TRUTH[row, block]):
                    same, counted = same + (token == true), counted + 1
                    if token == stop:
                        break
    assert 0 < same < counted < 30
    assert found["token_match"] == pytest.approx(same / counted, rel=1e-6)


def test_rollouts_that_ended(measured):
    written, stop, found = measured
    live = [written[0, :, 0], written[0, :, 1], written[1, :, 0], written[1, :, 1]]
    live = np.concatenate([*live, written[2, :, 0]])
    ended = (live == stop).any(-1)
    assert 0 < ended.sum() < len(ended)
    assert found["ended_fraction"] == pytest.approx(ended.mean(), rel=1e-6)


def test_what_the_authors_plot(measured):
    _, _, found = measured
    expected = found["alignment"] - found["diversity"] / 2
    assert abs(found["diversity"]) > 0.1
    assert found["matching_score"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def model():
    sampler = keras_ebft.BlockSampler(num_samples=2, **GEOMETRY)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.1))
    return model


def test_rows_that_fill_a_batch_have_no_blocks(model):
    """Five blocks in six places; a last batch of one row is filled up with another."""
    found = model.evaluate(rows(), batch_size=2, return_dict=True, verbose=0)
    assert found["live_block_fraction"] == pytest.approx(5 / 6, rel=1e-6)
    assert "ended_fraction" not in found
    assert "grad_norm" not in found


@pytest.mark.on_torch
def test_only_feature_matching_has_a_score():
    sampler = keras_ebft.BlockSampler(num_samples=2, **GEOMETRY)

    def zeros(prompts, completions, targets):
        return np.zeros(np.shape(completions)[:3])

    reward = keras_ebft.VerifierReward(zeros, decode=False)
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, reward=reward, seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    found = model.evaluate(X, return_dict=True, verbose=0)
    assert "matching_score" not in found
    assert "token_match" in found


def test_gradients_of_any_rank_have_one_norm():
    random = np.random.default_rng(0)
    shapes = ((), (3,), (2, 3), (2, 3, 4), (2, 1, 3, 2))
    values = [random.normal(size=shape).astype("float32") for shape in shapes]
    gradients = [None, *(keras.ops.convert_to_tensor(value) for value in values)]
    expected = np.sqrt(sum((value**2).sum() for value in values)) / 8
    found = gradient_norm(gradients, 8.0)
    assert float(to_numpy(found)) == pytest.approx(expected, rel=1e-5)


def moved_embedding(optimizer, steps=1):
    """How far steps move an embedding from which tokens were read repeatedly."""
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile(optimizer)
    embedding = model.causal_lm.backbone.token_embedding._embeddings
    before = to_numpy(embedding.value).copy()
    model.fit(np.tile(X, (1, 3)), epochs=steps, verbose=0)
    return to_numpy(embedding.value) - before


def test_an_embedding_moves_by_the_sum_over_all_times_a_token_was_read():
    """TensorFlow keeps them apart: Adam's squares would be of each by itself.

    The first step of Keras' Adam is `-rate g / (|g| + epsilon / sqrt(1 - beta_2))`,
    that of SGD `-rate g`.
    """
    gradient = -moved_embedding(keras.optimizers.SGD(1.0))
    assert (np.abs(gradient) > 1e-3).any()
    adam = keras.optimizers.Adam(0.1, beta_2=0.75, epsilon=1e-2)
    expected = -0.1 * gradient / (np.abs(gradient) + 2e-2)
    np.testing.assert_allclose(moved_embedding(adam), expected, atol=2e-6)


def test_accumulated_gradients_are_those_of_all_times_a_token_was_read():
    """Two equal batches: their mean is that of one."""
    gradient = -moved_embedding(keras.optimizers.SGD(1.0))
    adam = keras.optimizers.Adam(
        0.1, beta_2=0.75, epsilon=1e-2, gradient_accumulation_steps=2
    )
    expected = -0.1 * gradient / (np.abs(gradient) + 2e-2)
    np.testing.assert_allclose(moved_embedding(adam, 2), expected, atol=2e-6)


def test_a_norm_is_clipped_of_the_sum_over_all_times_a_token_was_read():
    gradient = -moved_embedding(keras.optimizers.SGD(1.0))
    norm = np.sqrt((gradient**2).sum())
    clipped = moved_embedding(keras.optimizers.SGD(1.0, clipnorm=norm / 2))
    np.testing.assert_allclose(clipped, -gradient / 2, atol=1e-6)


def norm_of_a_step(optimizer):
    """What is logged, and how far a step of SGD with rate 1 moves the weights."""
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile(optimizer)
    before = [to_numpy(w) for w in model.trainable_weights]
    history = model.fit(X, verbose=0).history
    after = [to_numpy(w) for w in model.trainable_weights]
    moved = sum(((a - b) ** 2).sum() for a, b in zip(after, before))
    return history["grad_norm"][0], np.sqrt(moved)


@pytest.mark.on_torch
def test_the_norm_of_the_gradient_before_clipping():
    SGD = keras.optimizers.SGD
    norm, moved = norm_of_a_step(SGD(1.0))
    assert norm == pytest.approx(moved, rel=1e-4)
    clipped, moved = norm_of_a_step(SGD(1.0, global_clipnorm=0.01))
    # TensorFlow clips by a norm in which rows that were read twice are not summed.
    assert moved == pytest.approx(0.01, rel=0.03)
    assert clipped == pytest.approx(norm, rel=1e-5)


@pytest.mark.on_torch
def test_the_norm_of_the_gradient_is_not_scaled():
    norm, moved = norm_of_a_step(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), 64.0)
    )
    assert norm == pytest.approx(moved, rel=1e-4)


class MinusOne(keras_ebft.FeatureMatchingReward):
    """The same for every token of every rollout."""

    def __call__(self, generated, target, rollouts=None):
        found = super().__call__(generated, target, rollouts)
        nothing = 0.0 * found["reward"]
        alike = {"alignment": nothing - 1.0, "diversity": nothing}
        return {**found, **alike, "reward": nothing - 1.0}


def test_samples_that_have_ended_are_not_the_best():
    """Of four samples one ends at once, the others are alike."""
    others = np.array([3, 7, 9])
    written = np.stack([[8, 8, 8], others, others, others])
    written = np.broadcast_to(written[None, :, None], (3, 4, 2, 3)).copy()
    sampler = keras_ebft.ReplaySampler(written, **GEOMETRY, stop_token_ids=(8,))
    model = keras_ebft.EBFTModel(
        llama(num_layers=1),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1,), pooling="token"),
        MinusOne(),
        seed=0,
    )
    model.compile()
    found = model.evaluate(X, batch_size=3, verbose=0, return_dict=True)
    assert found["reward"] == pytest.approx(-1.0)
    assert found["best_reward"] == pytest.approx(-1.0)
    assert found["zero_std_fraction"] == pytest.approx(1.0)


@pytest.mark.on_torch
def test_measured_by_steps(model):
    """Six steps in two epochs: at 2, 4 and 6; the last of an epoch is in its logs."""
    start = model.steps_trained
    every, later = Measure(lambda _: {"own": 1.5}, 2, unit="steps"), []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: later.append("val_own" in logs)
    )
    assert start % 2 == 0
    history = model.fit(
        X, batch_size=1, epochs=2, verbose=0, callbacks=[every, watch]
    ).history
    steps = [start + 2, start + 4, start + 6]
    assert [record["step"] for record in every.history] == steps
    assert [record["epoch"] for record in every.history] == [0, 1, 1]
    assert later == [False, True] * 3
    assert history["val_own"] == [1.5, 1.5]


@pytest.mark.on_torch
def test_changes_with_their_noise(model):
    changes = PairedFeatureMatching(model, X, num_samples=3)
    before = changes(model)["cross_entropy"]
    measure = Measure(changes, paired=True)
    model.fit(X, batch_size=3, epochs=2, verbose=0, callbacks=[measure])
    after = changes()["cross_entropy"]
    last = measure.history[-1]
    change = keras_ebft.evaluation.paired_change(before, after)
    assert change.mean != 0.0
    name = "val_cross_entropy"
    assert last[name] == pytest.approx(after.mean(), rel=1e-5)
    assert last[f"{name}_change"] == pytest.approx(change.mean, rel=1e-4)
    assert last[f"{name}_noise"] == pytest.approx(change.half_width, rel=1e-4)
    assert np.isfinite(last["val_feature_matching_loss_noise"])
    other = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    with pytest.raises(ValueError, match="whose rollouts were drawn"):
        changes(other)


@pytest.mark.on_torch
def test_documents_without_a_value_are_left_out(model):
    values = iter(([1.0, np.nan, 3.0], [2.0, 5.0, 4.0]))
    measure = Measure(lambda _: {"own": np.array(next(values))}, paired=True)
    model.fit(X, verbose=0, callbacks=[measure])
    (found,) = measure.history
    assert (found["val_own"], found["val_own_change"]) == (3.0, 1.0)
    assert found["val_own_noise"] == 0.0


@pytest.mark.on_torch
def test_measure_refuses_what_it_was_not_told(model):
    with pytest.raises(ValueError, match=r"unit.*epochs.*steps.*batches"):
        Measure(print, unit="batches")
    with pytest.raises(TypeError, match="paired=1"):
        Measure(print, paired=1)
    for value, options, message in (
        (np.ones(3), {}, "paired=True"),
        (1.0, {"paired": True}, "leave `paired` out"),
    ):
        measure = Measure(lambda _, value=value: {"own": value}, **options)
        with pytest.raises(TypeError, match=message):
            model.fit(X, verbose=0, callbacks=[measure])


@pytest.mark.on_torch
def test_throughput_counts_tokens_and_not_what_others_do(model, monkeypatch):
    """A clock that an evaluation and a callback of the user's move on by hours."""
    passed, real = [0.0], timing.time.perf_counter

    def hours(batch, logs):
        passed[0] += 9999.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: real() + passed[0])
    slow = keras.callbacks.LambdaCallback(
        on_train_batch_end=hours, on_test_batch_end=hours
    )
    history = model.fit(
        rows(),
        batch_size=1,
        epochs=2,
        validation_data=X,
        verbose=0,
        callbacks=[slow, Throughput()],
    ).history
    for seconds, speed in zip(history["step_time"], history["tokens_per_second"]):
        assert 0.0 < seconds < 9999.0
        # 12, 12 and 8 tokens.
        assert seconds * speed == pytest.approx(32 / 3, rel=1e-6)
    assert len(history["step_time"]) == 2
    plain = keras.Sequential([keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"EBFTModel\.fit.*Sequential"):
        plain.fit(np.ones((1, 1)), np.ones(1), callbacks=[Throughput()])
