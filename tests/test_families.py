"""Block-parallel passes against each block alone as a plain causal sequence."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import documents, family, llama, to_numpy

import keras_ebft
from keras_ebft import bridge

FAMILIES = (
    "Llama",
    "Llama3",
    "Mistral",
    "Qwen",
    "Qwen3",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "GPT2",
    "OPT",
)
TEMPERATURE = 0.7


def log_softmax(logits):
    logits = logits.astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class Alone:
    """The same network as plain causal sequences, all of one length."""

    def __init__(self, causal_lm, frozen_network):
        names = [out._keras_history.operation.name for out in frozen_network.outputs]
        backbone = causal_lm.backbone
        taps = [backbone.get_layer(name).output for name in names]
        self.hidden = keras.Model(backbone.input, taps)
        self.causal_lm = causal_lm

    def __call__(self, token_ids):
        """Logits `[rows, T, V]` and normalised features `[rows, T, D]`."""
        x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        taps = [to_numpy(tap) for tap in self.hidden(x, training=False)]
        joined = np.concatenate(taps, axis=-1)
        features = joined / np.linalg.norm(joined, axis=-1, keepdims=True)
        return to_numpy(self.causal_lm(x, training=False)), features


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_in_parallel_equal_each_block_alone(name):
    causal_lm = family(name)
    sampler = keras_ebft.BlockSampler(
        rollout_length=3,
        stride=4,
        context_length=4,
        num_samples=2,
        temperature=TEMPERATURE,
    )
    model = keras_ebft.EBFTModel(
        causal_lm, sampler, keras_ebft.FeatureNetwork(layers=(0.5, 1.0)), seed=0
    )
    prompt = documents(2, 18)
    rollouts = model.rollout(prompt, seed=3)
    token_ids = to_numpy(rollouts["token_ids"])
    scores = {k: to_numpy(v) for k, v in model.score(prompt, rollouts).items()}
    generated, target = (to_numpy(f) for f in model.features(prompt, rollouts))

    # What sampling reported is what scoring finds.
    np.testing.assert_allclose(
        to_numpy(rollouts["log_prob"]), scores["log_prob"], atol=2e-5
    )
    # Row 0 is the document; each other row one block, what follows it zeros.
    anchors = sampler.geometry(18).anchors
    places = [(block, sample) for block in range(len(anchors)) for sample in range(2)]
    rows = np.zeros((2, 1 + len(places), 18), dtype="int32")
    rows[:, 0] = prompt
    for row, (block, sample) in enumerate(places, start=1):
        anchor = anchors[block]
        rows[:, row, :anchor] = prompt[:, :anchor]
        rows[:, row, anchor : anchor + 3] = token_ids[:, sample, block]
    logits, features = (
        value.reshape(*rows.shape, -1)
        for value in Alone(causal_lm, model.frozen_network)(rows.reshape(-1, 18))
    )
    document = log_softmax(logits[:, 0, :-1])
    expected = np.take_along_axis(document, prompt[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores["document_log_prob"], expected, atol=2e-5)
    np.testing.assert_allclose(target[:, :, 0], features[:, 0, anchors + 2], atol=1e-5)
    for row, (block, sample) in enumerate(places, start=1):
        anchor = anchors[block]
        log_p = log_softmax(logits[:, row, anchor - 1 : anchor + 2] / TEMPERATURE)
        steps = token_ids[:, sample, block, :, None]
        np.testing.assert_allclose(
            scores["log_prob"][:, sample, block],
            np.take_along_axis(log_p, steps, axis=-1)[..., 0],
            atol=2e-5,
        )
        np.testing.assert_allclose(
            generated[:, sample, block, 0], features[:, row, anchor + 2], atol=1e-5
        )


def test_the_families_are_the_ones_documented():
    assert {f.removesuffix("Backbone") for f in bridge.FAMILIES} == {
        name for name in FAMILIES if name != "Gemma2"
    }


def test_other_families_are_named_in_the_error():
    backbone = keras_hub.models.GPTNeoXBackbone(
        vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8
    )
    causal_lm = keras_hub.models.GPTNeoXCausalLM(backbone)
    with pytest.raises(ValueError, match=r"Llama3Backbone.*Received: GPTNeoXBackbone"):
        keras_ebft.EBFTModel(causal_lm)


def test_a_network_that_does_not_route_attention_is_noticed(monkeypatch):
    model = keras_ebft.EBFTModel(llama(num_layers=4), seed=0)
    monkeypatch.setattr(model._step.policy, "num_layers", 5)
    with pytest.raises(ValueError, match=r"each of 5 layers.*4 routed calls"):
        model.rollout(documents(1, 20))


def test_untested_version_of_keras_hub_is_refused(monkeypatch):
    monkeypatch.setattr(keras_hub, "__version__", "0.99.0")
    with pytest.raises(ValueError, match=r"0\.32.*keras-hub 0\.99\.0.*pip install"):
        keras_ebft.EBFTModel(llama())


def test_layers_above_the_last_tap_are_not_copied():
    causal_lm = llama(num_layers=8)
    model = keras_ebft.EBFTModel(causal_lm, seed=0)
    names = {layer.name for layer in model.frozen_network.layers}
    assert "transformer_layer_5" in names
    assert "transformer_layer_6" not in names
    # Nor is the untied output projection, which no feature needs.
    assert not any("reverse" in w.path for w in model.frozen_network.weights)
