"""Half precision and quantized bases against float32."""

import re

import keras
import numpy as np
import pytest
from helpers import documents, flat, gradients, llama, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.networks import adapters

X = documents(2, 12)
ROLLOUTS = documents(8, 2, seed=1).reshape(2, 2, 2, 2)
SAMPLER = keras_ebft.BlockSampler(
    rollout_length=2, stride=5, context_length=4, num_samples=2
)


def build(causal_lm):
    network = keras_ebft.FeatureNetwork(layers=(1,))
    return keras_ebft.EBFTModel(causal_lm, SAMPLER, network, seed=0, ce_weight=0.3)


def is_dense(layer):
    return isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


def adapted(mode=None, **changes):
    """A Llama with the same adapters, quantized or not."""
    causal_lm = llama(**changes)
    if mode is not None:
        causal_lm.quantize(mode, filters=is_dense)
    causal_lm.backbone.enable_lora(2)
    random = np.random.default_rng(5)
    for variable in adapters.adapter_variables(
        adapters.adapted_layers(causal_lm.backbone)
    ):
        variable.assign(0.3 * random.normal(size=variable.shape))
    return causal_lm


class Measured:
    """Scores, features, rewards and the gradient of a model."""

    def __init__(self, causal_lm):
        model = build(causal_lm)
        self.score = model.score(X, ROLLOUTS)
        self.features = model.features(X, ROLLOUTS)
        self.rewards = model.rewards(X, ROLLOUTS)
        variables = causal_lm.trainable_variables
        advantage = self.rewards["advantage"]

        def loss():
            scores = model.score(X, ROLLOUTS)
            weighted = keras.ops.multiply(scores["log_prob"], advantage[..., None])
            documents = keras.ops.mean(scores["document_log_prob"])
            return -keras.ops.mean(weighted) - documents

        self.gradient = flat(gradients(loss, variables))

    def cosine(self, other):
        one, two = self.gradient, other.gradient
        return one @ two / np.linalg.norm(one) / np.linalg.norm(two)


@pytest.fixture(scope="module")
def float32():
    return Measured(llama())


@pytest.fixture(scope="module")
def adapted_float32():
    return Measured(adapted())


HALF = ["mixed_bfloat16"] + [
    pytest.param(name, marks=[pytest.mark.slow, pytest.mark.compiled])
    for name in ("bfloat16", "mixed_float16")
]


@pytest.mark.parametrize("policy", HALF)
def test_half_precision_is_near_float32(float32, policy):
    half = Measured(llama(dtype=policy))
    # bfloat16 has 8 bits: 0.4 % of logits of about 5. float16 has 11.
    scale = 0.15 if policy == "mixed_float16" else 1.0
    for name, value in half.score.items():
        assert keras.backend.standardize_dtype(value.dtype) == "float32", name
        expected = to_numpy(float32.score[name])
        np.testing.assert_allclose(to_numpy(value), expected, atol=0.06 * scale)
    for value, expected in zip(half.features, float32.features):
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        np.testing.assert_allclose(
            to_numpy(value), to_numpy(expected), atol=0.02 * scale
        )
        # Normalised in float32, not in half precision.
        norms = np.linalg.norm(to_numpy(value), axis=-1)
        np.testing.assert_allclose(norms, 1.0, atol=1e-6)
    for name, value in half.rewards.items():
        expected = to_numpy(float32.rewards[name])
        np.testing.assert_allclose(to_numpy(value), expected, atol=0.1 * scale)
    assert half.cosine(float32) > 1 - 2e-3 * scale


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("mode", "least"), [("int8", 0.99), ("int4", 0.85)])
def test_gradients_on_a_quantized_base_point_the_same_way(adapted_float32, mode, least):
    quantized = Measured(adapted(mode))
    assert quantized.cosine(adapted_float32) > least


def test_loss_scaling_follows_the_backbone():
    causal_lm = llama(num_layers=1, dtype="mixed_float16")
    before = causal_lm.get_weights()
    model = build(causal_lm)
    model.compile(keras.optimizers.SGD(0.1))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    history = model.fit(X, batch_size=2, epochs=2, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())
    moved = [np.abs(a - b).max() for a, b in zip(before, causal_lm.get_weights())]
    assert 0 < max(moved) < 1


@pytest.mark.slow
def test_quantized_models_that_cannot_be_trained_rightly_are_refused():
    causal_lm = llama(num_layers=1)
    causal_lm.quantize("int8", filters="token_embedding")
    with pytest.raises(ValueError, match=r"token_embedding.*filters=is_dense"):
        build(causal_lm)
    causal_lm = llama(num_layers=1)
    causal_lm.quantize("int8", filters=is_dense)
    with pytest.raises(ValueError, match=r"int8 without any.*enable_lora"):
        build(causal_lm)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_on_a_quantized_base_in_pure_half_precision(mode):
    """Keras' own layers fail there on PyTorch, in the first step or `generate`."""
    causal_lm = adapted(mode, num_layers=1, dtype="bfloat16")
    if keras.backend.backend() != "torch":
        log_prob = to_numpy(build(causal_lm).score(X, ROLLOUTS)["log_prob"])
        assert np.isfinite(log_prob).all()
        return
    remedy = rf"LlamaBackbone quantized to {mode}.*'bfloat16'.*dtype='mixed_bfloat16'"
    with pytest.raises(ValueError, match=remedy):
        build(causal_lm)
    with pytest.raises(RuntimeError, match="BFloat16"):
        causal_lm({"token_ids": X, "padding_mask": np.ones_like(X)})
    build(adapted(mode, num_layers=1, dtype="mixed_bfloat16")).score(X, ROLLOUTS)


@pytest.mark.parametrize("adapted", ["never", "before", "after"])
def test_float8_is_refused(adapted):
    """With adapters Keras would fail in the first step, far from what caused it."""
    causal_lm = llama(num_layers=1)
    if adapted == "before":
        causal_lm.backbone.enable_lora(2)
    causal_lm.quantize("float8", filters=is_dense)
    if adapted == "after":
        causal_lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match=r"LlamaBackbone quantized to float8.*int8"):
        build(causal_lm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [pytest.param("int8", marks=pytest.mark.compiled), "int4"]
)
def test_training_on_a_quantized_base_saves_and_goes_on(mode, tmp_path):
    model = build(adapted(mode, num_layers=1))
    model.compile(keras.optimizers.Adam(0.01))
    base = {v.path: to_numpy(v) for v in model.causal_lm.non_trainable_variables}
    model.fit(X, batch_size=2, verbose=0)
    for variable in model.causal_lm.non_trainable_variables:
        np.testing.assert_array_equal(base[variable.path], to_numpy(variable))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(X, batch_size=2, verbose=0)
    for one, other in zip(model.causal_lm.variables, loaded.causal_lm.variables):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other), err_msg=one.path)


def said_of_steps(caplog, optimizer, dtype="bfloat16"):
    """What `fit` warns of, and the share of weights that its steps changed."""
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1, dtype=dtype), seed=0)
    model.compile(optimizer)
    before = [to_numpy(ops.cast(w, "float32")) for w in model.trainable_variables]
    caplog.clear()
    with caplog.at_level("WARNING", logger="keras_ebft"):
        model.fit(documents(4, 12), epochs=3, verbose=0)
    after = [to_numpy(ops.cast(w, "float32")) for w in model.trainable_variables]
    moved = np.mean(flat(before) != flat(after))
    texts = [r.getMessage() for r in caplog.records]
    return [text for text in texts if "rounded back" in text], moved


@pytest.mark.on_torch
def test_steps_that_round_away_are_said(caplog):
    """Only weights below about 2.6e-4 are fine enough for a step of 1e-6."""
    (text,), moved = said_of_steps(caplog, keras.optimizers.Adam(1e-6))
    assert moved < 0.05
    share = float(re.search(r"changes (\S+) %", text).group(1)) / 100
    assert moved <= share < 0.05
    assert 'dtype="mixed_bfloat16"' in text


# Learning rates whose steps round away and arrive, and the share that then moves.
RATE_SIZED = {
    "Adamax": (1e-6, 1e-2, 0.5),
    "Lion": (1e-6, 1e-2, 0.5),
    "RMSprop": (1e-6, 1e-2, 0.5),
    "Adagrad": (1e-6, 1e-2, 0.5),
    # Shares of the size of the weights, or of the rate.
    "Adafactor": (1e-5, 0.3, 0.5),
    # In bfloat16 Keras divides by 1 - .999 = 0: all steps are skipped and counted,
    "Lamb": (1e-5, 0.3, 0.0),
    # or multiplies by it, in what Muon leaves to AdamW.
    "Muon": (1e-6, 0.1, 0.3),
}


@pytest.mark.on_torch
@pytest.mark.parametrize("name", RATE_SIZED)
def test_steps_of_every_optimizer_that_has_a_size(caplog, name):
    small, large, share = RATE_SIZED[name]
    optimizer = getattr(keras.optimizers, name)
    said, moved = said_of_steps(caplog, optimizer(small))
    assert len(said) == 1 and moved < 0.05
    said, moved = said_of_steps(caplog, optimizer(large))
    assert not said and moved >= share


@pytest.mark.on_torch
def test_steps_that_arrive_are_not(caplog):
    schedules = keras.optimizers.schedules
    warm_up = schedules.PolynomialDecay(1e-9, 1000, 0.05)
    for optimizer, dtype in (
        (keras.optimizers.Adam(1e-2), "bfloat16"),
        (keras.optimizers.AdamW(warm_up), "bfloat16"),
        # How far it goes is for the gradient to say.
        (keras.optimizers.SGD(1e-6), "bfloat16"),
        (keras.optimizers.Adam(1e-6), "mixed_bfloat16"),
    ):
        assert said_of_steps(caplog, optimizer, dtype)[0] == []
