"""Which hidden states become features, and how they are pooled."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.functional.pooling import pool

SAMPLER = {"rollout_length": 3, "stride": 4, "context_length": 4, "num_samples": 2}
X = documents(2, 14)
ROLLOUTS = documents(2 * 2 * 2, 3, seed=1).reshape(2, 2, 2, 3)


@pytest.fixture(scope="module")
def causal_lm():
    return llama()


def build(causal_lm, **network):
    return keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(**SAMPLER),
        keras_ebft.FeatureNetwork(**network),
        seed=0,
    )


@pytest.mark.parametrize(
    ("mode", "num_layers", "taps"),
    [
        ("concat", 8, [2, 4, 6]),
        ("stack", 2, [1]),
        ("last", 8, [8]),
        ("mean", 4, [1, 2, 3, 4]),
        ("middle", 8, [4, 5]),
        ("middle_concat", 7, [3, 4]),
        ("middle_stack", 1, [1]),
    ],
)
def test_taps_of_every_mode(mode, num_layers, taps):
    assert keras_ebft.FeatureNetwork(mode=mode).tapped_layers(num_layers) == taps


@pytest.mark.slow_compiled
def test_middle_modes_are_combinations_of_two_layers(causal_lm):
    def features(**network):
        generated, target = build(causal_lm, **network).features(X, ROLLOUTS)
        return to_numpy(generated), to_numpy(target)

    for mode in ("concat", "stack"):
        middle = features(mode=f"middle_{mode}")
        explicit = features(mode=mode, layers=(1, 2))
        for one, two in zip(middle, explicit):
            np.testing.assert_array_equal(one, two)
    stacked = features(mode="middle_stack")[0]
    assert stacked.shape == (2, 2, 2, 2, 16)
    # The last layer is tapped after the final normalisation, alone too.
    np.testing.assert_array_equal(
        features(mode="last")[0][..., 0, :], stacked[..., 1, :]
    )


TOKENS = np.arange(12.0, dtype="float32").reshape(1, 4, 1, 3) + 1.0
COUNTED = np.array([[False, True, True, False]])
EXISTS = np.array([[True, True, True, False]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("last_token", [[[7.0, 8.0, 9.0]]]),
        ("mean", [[[11 / 3, 13 / 3, 15 / 3]]]),
        ("concat", [[[0, 0, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0]]]),
        ("token", [[[[0, 0, 0]], [[4, 5, 6]], [[7, 8, 9]], [[0, 0, 0]]]]),
    ],
)
def test_pooling_by_hand(pooling, expected):
    tokens, counted, exists = map(ops.convert_to_tensor, (TOKENS, COUNTED, EXISTS))
    found = to_numpy(pool(tokens, counted, exists, pooling))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    nothing = to_numpy(pool(tokens, ops.zeros_like(counted), exists, pooling))
    assert not nothing.any()


def test_token_pooling_rewards_every_token_by_itself(causal_lm):
    model = build(causal_lm, layers=(1,), pooling="token")
    generated, target = model.features(X, ROLLOUTS)
    assert generated.shape == (2, 2, 2, 3, 1, 16)
    rewards = model.rewards(X, ROLLOUTS)
    for step in range(3):
        alone = keras_ebft.functional.feature_matching_rewards(
            generated[:, :, :, step], target[:, :, step]
        )
        for name in ("alignment", "diversity", "reward"):
            np.testing.assert_allclose(
                to_numpy(rewards[name])[..., step],
                to_numpy(getattr(alone, name)),
                atol=1e-5,
            )


@pytest.mark.slow_compiled
def test_a_backbone_of_ones_own(causal_lm):
    other = llama(num_layers=3, hidden_dim=8).backbone
    model = build(causal_lm, network=other, layers=(2,))
    assert model.features(X, ROLLOUTS)[0].shape == (2, 2, 2, 1, 8)
    # The policy's own backbone gives what the frozen copy gives.
    own = build(causal_lm, network=causal_lm.backbone, layers=(1,))
    copy = build(causal_lm, layers=(1,))
    for one, two in zip(own.features(X, ROLLOUTS), copy.features(X, ROLLOUTS)):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(two))
    with pytest.raises(ValueError, match=r"of 31 tokens.*of 30"):
        build(causal_lm, network=llama(vocabulary_size=30).backbone)


class Averaging(keras.Layer):
    """Embeds tokens and positions, and averages what is visible of them."""

    def __init__(self):
        super().__init__(name="averaging")
        self.embedding = keras.layers.Embedding(31, 4, name="token_table")
        self.embedding.build(None)

    def call(self, token_ids, positions, attend):
        x = self.embedding(token_ids) + ops.cast(positions, "float32")[..., None]
        heads = ops.expand_dims(x, -2)
        seen = attend(0.0 * heads, 0.0 * heads, heads, scale=1.0)
        return ops.squeeze(seen, -2)


@pytest.mark.not_on_tensorflow
def test_a_callable_of_ones_own(causal_lm):
    network = Averaging()
    model = build(causal_lm, network=network)
    generated, target = (to_numpy(f) for f in model.features(X, ROLLOUTS))
    assert generated.shape == (2, 2, 2, 1, 4)
    table = to_numpy(network.embedding.embeddings)

    def expected(tokens):
        mean = np.mean(table[tokens] + np.arange(len(tokens))[:, None], axis=0)
        return mean / np.linalg.norm(mean)

    for b, j, k in np.ndindex(2, 2, 2):
        anchor = 4 + 4 * k
        seen = np.concatenate([X[b, :anchor], ROLLOUTS[b, j, k]])
        np.testing.assert_allclose(generated[b, j, k, 0], expected(seen), atol=1e-5)
        truth = expected(X[b, : anchor + 3])
        np.testing.assert_allclose(target[b, k, 0], truth, atol=1e-5)
    before = table.copy()
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(X, batch_size=2, verbose=0)
    np.testing.assert_array_equal(to_numpy(network.embedding.embeddings), before)


def test_callables_must_keep_their_promises(causal_lm):
    def uneven(token_ids, positions, attend):
        x = ops.cast(token_ids, "float32")[..., None, None]
        for _ in range(1 if len(token_ids.shape) == 2 else 2):
            x = attend(x, x, x, scale=1.0)
        return x[..., 0, :]

    with pytest.raises(ValueError, match="as often over rollouts"):
        build(causal_lm, network=uneven).features(X, ROLLOUTS)
    with pytest.raises(ValueError, match=r"\[\.\.\., D\].*Received"):
        build(causal_lm, network=lambda tokens, *_, attend: tokens).features(
            X, ROLLOUTS
        )


def test_the_copy_follows_the_policy(causal_lm):
    """After each step: decay * copy + (1 - decay) * policy, one step behind."""
    model = build(causal_lm, layers=(1,), ema_decay=0.75)
    start = model.frozen_network.get_weights()
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(X, batch_size=2, verbose=0)
    for one, two in zip(start, model.frozen_network.get_weights()):
        np.testing.assert_allclose(one, two, atol=1e-7)
    layer = causal_lm.backbone.transformer_layers[0]
    policy = layer.get_weights()
    model.fit(X, batch_size=2, verbose=0)
    copied = model.frozen_network.get_layer(layer.name).get_weights()
    moved = 0.0
    for copy, old, trained in zip(copied, start[1:], policy):
        np.testing.assert_allclose(copy, 0.75 * old + 0.25 * trained, atol=1e-6)
        moved = max(moved, np.abs(copy - old).max())
    assert moved > 1e-5
    # Evaluation leaves the copy alone.
    before = model.frozen_network.get_weights()
    model.evaluate(X, batch_size=2, verbose=0)
    for one, two in zip(before, model.frozen_network.get_weights()):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_a_coarse_copy_stays_where_the_policy_is(decay, caplog):
    """In bfloat16 0.99 and 0.01 would be 0.988 and 0.01001."""
    causal_lm = llama(num_layers=1, dtype="bfloat16")
    model = build(causal_lm, layers=(1,), ema_decay=decay)
    before = [to_numpy(ops.cast(w, "float32")) for w in model.frozen_network.weights]
    model.compile(keras.optimizers.SGD(0.0))
    with caplog.at_level("WARNING", logger="keras_ebft"):
        model.fit(np.concatenate([X] * 5), batch_size=2, verbose=0)
    after = [to_numpy(ops.cast(w, "float32")) for w in model.frozen_network.weights]
    for one, two in zip(before, after):
        np.testing.assert_array_equal(one, two)
    percent = {0.9: "2", 0.99: "20"}[decay]
    assert f"until it is {percent} % away" in caplog.text


def test_answers_are_pooled_at_their_last_token(causal_lm):
    """Rollouts and truth alike: the window's last answer token, not its last."""
    answers = np.zeros((2, 14), dtype=bool)
    answers[:, [4, 5, 8]] = True
    x = {"token_ids": X, "answer_mask": answers}
    every = build(causal_lm, layers=(1,), pooling="token").features(X, ROLLOUTS)
    pooled = build(causal_lm, layers=(1,)).features(x, ROLLOUTS)
    for tokens, last in zip(map(to_numpy, every), map(to_numpy, pooled)):
        # The window at 4 answers at its first two tokens, the one at 8 at its first.
        expected = np.stack([tokens[..., 0, 1, :, :], tokens[..., 1, 0, :, :]], axis=-3)
        np.testing.assert_allclose(last, expected, atol=1e-6)
