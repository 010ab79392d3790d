"""LoRA: what is trained, what stays, and what the adapters' gradients are."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    XLA,
    documents,
    family,
    flat,
    gradients,
    llama,
    set_random_seed,
    to_numpy,
)

import keras_ebft
from keras_ebft.networks import adapters, num_layers

SAMPLER = keras_ebft.BlockSampler(
    rollout_length=2, stride=5, context_length=4, num_samples=2
)
NETWORK = keras_ebft.FeatureNetwork(layers=(1,))
X = documents(2, 12)


def build(causal_lm, **options):
    return keras_ebft.EBFTModel(causal_lm, SAMPLER, NETWORK, seed=0, **options)


# KerasHub's own names for the layers to adapt are not those of this family.
GEMMA3N_LAYERS = ["q_proj", "v_proj"]


def adapted(name="GPT2", rank=2, nonzero=False, targets=None, **changes):
    causal_lm = family(name, **changes)
    causal_lm.backbone.enable_lora(rank, target_layer_names=targets)
    if nonzero:
        random = np.random.default_rng(3)
        for layer in adapters.adapted_layers(causal_lm.backbone):
            layer.lora_kernel_b.assign(
                0.2 * random.normal(size=layer.lora_kernel_b.shape)
            )
    return causal_lm


@pytest.fixture(scope="module")
def fitted():
    """A GPT-2, which has biases, after training of its adapters."""
    causal_lm = adapted(num_layers=1)
    before = {v.path: to_numpy(v) for v in causal_lm.variables}
    model = build(causal_lm, ce_weight=0.1)
    features = [to_numpy(f) for f in model.features(X, np.ones((2, 2, 2, 2), "int32"))]
    model.compile(keras.optimizers.Adam(0.05))
    model.fit(X, batch_size=2, epochs=2, verbose=0)
    return model, before, features


@pytest.mark.not_on_tensorflow
def test_adapters_alone_move_and_have_slots(fitted):
    model, before, _ = fitted
    moved = {
        v.path
        for v in model.causal_lm.variables
        if (before[v.path] != to_numpy(v)).any()
    }
    expected = {v.path for v in model.causal_lm.variables if "lora" in v.path}
    assert moved == expected
    assert len(moved) == 4
    assert {v.path for v in model.trainable_variables} == expected
    assert len(model.optimizer.variables) == 2 + 2 * len(expected)


def test_the_frozen_network_is_the_base_and_no_copy(fitted):
    model, _, features = fitted
    ours = {id(v) for v in model.causal_lm.variables}
    assert {id(v) for v in model.frozen_network.variables} <= ours
    after = model.features(X, np.ones((2, 2, 2, 2), "int32"))
    for one, other in zip(features, after):
        np.testing.assert_allclose(one, to_numpy(other), atol=1e-6)
    # The adapters are what makes the policy another network.
    with adapters.switched_off(adapters.adapted_layers(model.causal_lm.backbone)):
        base = to_numpy(logits(model.causal_lm))
    assert np.abs(base - to_numpy(logits(model.causal_lm))).max() > 1e-2


def test_adapters_alone_are_saved_and_loaded(fitted, tmp_path):
    causal_lm = fitted[0].causal_lm
    path = str(tmp_path / "adapters.lora.h5")
    causal_lm.backbone.save_lora_weights(path)
    other = family("GPT2", num_layers=1)
    other.backbone.load_lora_weights(path)
    np.testing.assert_array_equal(to_numpy(logits(causal_lm)), to_numpy(logits(other)))


def test_a_preset_of_the_trained_model_has_the_adapters_merged(fitted, tmp_path):
    causal_lm = fitted[0].causal_lm
    causal_lm.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert not adapters.adapted_layers(loaded.backbone)
    np.testing.assert_allclose(
        to_numpy(logits(causal_lm)), to_numpy(logits(loaded)), atol=1e-5
    )


def logits(causal_lm):
    x = {"token_ids": X, "padding_mask": np.ones_like(X)}
    return causal_lm(x, training=False)


@pytest.mark.parametrize(
    ("name", "targets", "changes"),
    [
        ("Llama", None, {"num_layers": 1}),
        pytest.param("Gemma3n", GEMMA3N_LAYERS, {}, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_adapters_are_those_of_the_kernel(name, targets, changes):
    """dL/dB = A^T dL/dK and dL/dA = dL/dK B^T, K the kernel of a plain model."""
    causal_lm = adapted(name, nonzero=True, targets=targets, **changes)
    plain = family(name, **changes)
    layers = adapters.adapted_layers(causal_lm.backbone)
    pairs = zip(
        adapters.layers_of(causal_lm.backbone), adapters.layers_of(plain.backbone)
    )
    kernels = [twin._kernel for layer, twin in pairs if layer in layers]
    assert len(kernels) == len(layers) >= 2
    for layer, kernel in zip(layers, kernels):
        kernel.assign(to_numpy(layer.kernel))
    model, twin = build(causal_lm, ce_weight=0.5), build(plain, ce_weight=0.5)
    rollouts = model.rollout(X, seed=1)
    outputs = {name: model.rewards(X, rollouts)[name] for name in ("advantage",)}

    def loss(of):
        scores = of.score(X, rollouts)
        weighted = scores["log_prob"] * outputs["advantage"][..., None]
        return -keras.ops.mean(weighted) - keras.ops.mean(scores["document_log_prob"])

    found = gradients(lambda: loss(model), adapters.adapter_variables(layers))
    kernel_gradients = gradients(lambda: loss(twin), kernels)
    expected = []
    for layer, gradient in zip(layers, kernel_gradients):
        a, b = (to_numpy(v) for v in adapters.adapter_variables([layer]))
        axes = list(range(a.ndim - 1))
        expected += [gradient @ b.T, np.tensordot(a, gradient, axes=(axes, axes))]
    scale = np.abs(flat(expected)).max()
    np.testing.assert_allclose(flat(found) / scale, flat(expected) / scale, atol=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_are_the_mean_over_batches():
    """Two batches in one update, and what each would have done by itself."""

    def moved(rates, accumulated=None):
        set_random_seed(1)
        causal_lm = adapted("Llama", nonzero=True, num_layers=1)
        before = causal_lm.get_weights()
        model = build(causal_lm, ce_weight=0.3)
        optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=accumulated)
        model.compile(optimizer)
        for rate, row in zip(rates, documents(2, 12, seed=7)):
            optimizer.learning_rate = rate
            model.train_on_batch(row[None])
        after = causal_lm.get_weights()
        return [new - old for old, new in zip(before, after)]

    together = moved((0.5, 0.5), accumulated=2)
    first, second = moved((0.5, 0.0)), moved((0.0, 0.5))
    for both, one, two in zip(together, first, second):
        np.testing.assert_allclose(both, (one + two) / 2, atol=1e-6)
    difference = np.abs(flat(first) - flat(second)).max()
    assert difference > 1e-3
    # Adapters alone: two matrices each for query and value.
    assert sum(np.abs(change).max() > 0 for change in together) == 4


def test_the_reference_of_the_kl_term_is_the_base():
    rollouts = np.ones((2, 2, 2, 2), "int32")
    options = {"kl_weight": 0.1, "kl_estimator": "k1"}
    # Adapters start as zero: policy and reference are one.
    same = build(adapted("Llama", num_layers=1), **options)
    assert abs(float(to_numpy(same.loss_terms(X, rollouts)["kl"]))) < 1e-6
    causal_lm = adapted("Llama", nonzero=True, num_layers=1)
    model = build(causal_lm, **options)
    assert len(model.frozen_networks) == 1
    ours = {id(v) for v in causal_lm.variables}
    assert {id(v) for v in model.frozen_network.variables} <= ours
    plain = build(family("Llama", num_layers=1))
    log_prob, base = (
        to_numpy(m.score(X, rollouts)["log_prob"]) for m in (model, plain)
    )
    found = float(to_numpy(model.loss_terms(X, rollouts)["kl"]))
    assert found == pytest.approx((log_prob - base).mean(), rel=1e-4)
    assert abs(found) > 1e-3


@pytest.mark.slow
@pytest.mark.compiled
def test_adapters_train_compiled_by_xla():
    model = build(adapted("Llama", num_layers=1))
    model.compile(keras.optimizers.Adam(0.01), **XLA)
    history = model.fit(X, batch_size=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_enabling_that_enables_nothing_is_noticed():
    causal_lm = llama(num_layers=1)
    causal_lm.backbone.enable_lora(2, target_layer_names=["c_attn"])
    with pytest.raises(ValueError, match=r"find layers.*LlamaBackbone.*'query'"):
        build(causal_lm)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("SmolLM3", ["q_proj", "v_proj"]),
        ("GPTNeoX", ["query_key_value"]),
        ("Gemma3n", GEMMA3N_LAYERS),
    ],
)
def test_families_that_need_names_train_with_them(name, layers):
    causal_lm = family(name)
    causal_lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match=f"{name}Backbone.*'{layers[0]}'"):
        build(causal_lm)
    causal_lm = family(name)
    causal_lm.backbone.enable_lora(2, target_layer_names=layers)
    model = build(causal_lm)
    # Two adapter matrices each.
    count = num_layers(causal_lm.backbone) * len(layers)
    assert len(model.trainable_variables) == 2 * count


def test_a_base_that_would_train_is_refused():
    causal_lm = adapted("Llama", num_layers=1)
    causal_lm.backbone.get_layer("sequence_output_layernorm").trainable = True
    with pytest.raises(ValueError, match=r"adapters alone.*sequence_output_layernorm"):
        build(causal_lm)


def test_a_feature_network_that_follows_is_refused():
    network = keras_ebft.FeatureNetwork(layers=(1,), ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay=0\.9.*LlamaBackbone.*adapters"):
        keras_ebft.EBFTModel(adapted("Llama", num_layers=1), SAMPLER, network)


def test_a_feature_network_that_learns_is_refused():
    critic = keras_ebft.Critic(train_features=True)
    with pytest.raises(ValueError, match=r"train_features=True.*LlamaBackbone"):
        keras_ebft.EBFTModel(
            adapted("Llama", num_layers=1), SAMPLER, NETWORK, critic=critic
        )


def test_adapters_on_embeddings_are_refused():
    causal_lm = llama(num_layers=1)
    causal_lm.backbone.enable_lora(2, target_layer_names=["token_embedding"])
    with pytest.raises(ValueError, match=r"token_embedding.*target_layer_names"):
        build(causal_lm)


def test_adapters_enabled_after_the_model_was_made_are_refused():
    """It has a frozen copy, and its optimizer and files know nothing of them."""
    causal_lm = llama(num_layers=1)
    model = build(causal_lm)
    model.compile(keras.optimizers.SGD(0.0))
    causal_lm.backbone.enable_lora(2)
    for use in (model.fit, model.evaluate, model.train_on_batch, model.rollout):
        with pytest.raises(ValueError, match=r"0 adapted layers.*Received: 2.*anew"):
            use(X)
