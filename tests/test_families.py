"""Block-parallel passes against each block alone as a plain causal sequence."""

import inspect
import json
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from helpers import (
    VOCABULARY,
    documents,
    family,
    flat,
    gradients,
    llama,
    randomise,
    to_numpy,
)
from keras import ops

import keras_ebft
from keras_ebft import networks
from keras_ebft.export import layouts
from keras_ebft.networks.patches import patched

SERVING = (
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
PATCHED = (
    "Bloom",
    "Falcon",
    "Gemma3n",
    "GPTNeoX",
    "Mixtral",
    "Phi3",
    "QwenMoe",
    "Qwen3Moe",
    "SmolLM3",
)
# Not "Gemma4 shared": on JAX KerasHub's own forward pass of a model so small, compiled
# and not, differs by 2e-4, because it amplifies rounding a thousand times.
ROWS = (
    "Phi3 long",
    "Gemma4",
    "Gemma4 global",
    "GptOss",
    "Qwen3_5",
    "Qwen3_5Moe",
    "RWKV7",
)
FAMILIES = (*SERVING, *PATCHED, *ROWS)
# Factors of Phi-3's rotary embedding, one per pair of coordinates.
NOT_PER_LAYER = ("rope_scaling_short_factor", "rope_scaling_long_factor")
# Compiling is most of the time: the quick run takes one family for each thing that
# can go wrong.
QUICK_FAMILIES = (*SERVING, "Falcon", "Gemma3n", "Mixtral", "GptOss")
QUICK_GRADIENTS = ("Mixtral",)
# One of each route and of each thing that a compiler could get wrong; the others are
# the same operations of Keras in another order, checked where nothing compiles.
COMPILED = ("Llama", "Gemma3", "GPT2", "Falcon", "Mixtral", "GptOss", "RWKV7")
COMPILED_GRADIENTS = ("Llama", "Gemma3", "Mixtral", "RWKV7")
TEMPERATURE = 0.7


def parametrize(quick, compiled):
    """All families; those in neither run among the slow tests, and on PyTorch."""

    def marks(name):
        compiles = name in compiled
        if name in quick:
            return [] if compiles else [pytest.mark.slow_compiled]
        return [pytest.mark.slow, *([pytest.mark.compiled] if compiles else [])]

    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks(name)) for name in FAMILIES]
    )


def log_softmax(logits):
    logits = logits.astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def taps_alone(causal_lm, frozen_network, x):
    """Hidden states at the frozen network's taps, from the trained model's layers."""
    backbone = causal_lm.backbone
    if type(backbone).__name__ == "Gemma3nBackbone":
        return [merged_streams(backbone, x, layer) for layer in (2, 4)]
    names = [out._keras_history.operation.name for out in frozen_network.outputs]
    taps = [backbone.get_layer(name).output for name in names]
    outputs = keras.Model(backbone.input, taps)(x, training=False)
    # Layers of some families return more than hidden states.
    return [o[0] if isinstance(o, (list, tuple)) else o for o in outputs]


def plain_logits(causal_lm, x):
    """Logits of KerasHub's own forward pass, as `generate` computes them."""
    if type(causal_lm.backbone).__name__ == "Gemma3nBackbone":
        # Called as a model it keeps the embeddings it was built with, on JAX and
        # TensorFlow, as its output head.
        hidden = causal_lm.backbone(x, training=False)
        text = causal_lm.backbone.language_model
        return text.token_embedding(hidden, reverse=True)
    return causal_lm(x, training=False)


def merged_streams(backbone, x, num_layers):
    """What Gemma 3n's decoder would return if it ended after some layers."""
    text = backbone.language_model
    layers = text.transformer_layers[:num_layers]
    last = num_layers == len(text.transformer_layers)
    normalise = text.final_normalization if last else lambda hidden: hidden
    patches = [
        (text, "transformer_layers", layers),
        (text, "final_normalization", normalise),
    ]
    with patched(patches):
        return backbone(x, training=False)


class Alone:
    """The same network as plain causal sequences, all of one length."""

    def __init__(self, causal_lm, frozen_network):
        self.causal_lm = causal_lm
        self.frozen_network = frozen_network

    def __call__(self, token_ids):
        """Logits `[rows, T, V]` and normalised features `[rows, T, D]`."""
        x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        if "position_ids" in self.causal_lm.input:
            index = np.arange(token_ids.shape[1], dtype="int32")
            x["position_ids"] = np.broadcast_to(index, token_ids.shape)
        taps = map(to_numpy, taps_alone(self.causal_lm, self.frozen_network, x))
        joined = np.concatenate(list(taps), axis=-1)
        features = joined / np.linalg.norm(joined, axis=-1, keepdims=True)
        return to_numpy(plain_logits(self.causal_lm, x)), features


# RWKV-7 says that kernels of a package of its own would be faster.
pytestmark = pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package:UserWarning")


def errors(name):
    """Largest differences between blocks in parallel and each block alone.

    Returns:
        dict of `log_prob` (rollouts and document, as scored and as sampled) and
        `features` (of rollouts and of the true continuation).
    """
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
    log_prob = [to_numpy(rollouts["log_prob"]) - scores["log_prob"]]
    # Row 0 is the document; each other row one block, what follows it zeros.
    anchors = sampler.geometry(18).anchors
    places = [(block, sample) for block in range(len(anchors)) for sample in range(2)]
    rows = np.zeros((2, 1 + len(places), 18), dtype="int32")
    rows[:, 0] = prompt
    for row, (block, sample) in enumerate(places, start=1):
        anchor = anchors[block]
        rows[:, row, :anchor] = prompt[:, :anchor]
        rows[:, row, anchor : anchor + 3] = token_ids[:, sample, block]
    logits, alone = (
        value.reshape(*rows.shape, -1)
        for value in Alone(causal_lm, model.frozen_network)(rows.reshape(-1, 18))
    )
    document = log_softmax(logits[:, 0, :-1])
    expected = np.take_along_axis(document, prompt[:, 1:, None], axis=-1)[..., 0]
    log_prob.append(scores["document_log_prob"] - expected)
    features = [target[:, :, 0] - alone[:, 0, anchors + 2]]
    for row, (block, sample) in enumerate(places, start=1):
        anchor = anchors[block]
        log_p = log_softmax(logits[:, row, anchor - 1 : anchor + 2] / TEMPERATURE)
        steps = token_ids[:, sample, block, :, None]
        expected = np.take_along_axis(log_p, steps, axis=-1)[..., 0]
        log_prob.append(scores["log_prob"][:, sample, block] - expected)
        features.append(generated[:, sample, block, 0] - alone[:, row, anchor + 2])
    return {
        "log_prob": max(np.abs(difference).max() for difference in log_prob),
        "features": max(np.abs(difference).max() for difference in features),
    }


@parametrize(QUICK_FAMILIES, compiled=COMPILED)
def test_blocks_in_parallel_equal_each_block_alone(name):
    found = errors(name)
    assert found["log_prob"] < 2e-5
    assert found["features"] < 1e-5


@parametrize(QUICK_GRADIENTS, compiled=COMPILED_GRADIENTS)
def test_gradients_equal_those_of_plain_sequences(name):
    """The gradient of weighted log-probabilities, with every block run alone."""
    causal_lm = family(name)
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=6, context_length=5, num_samples=2, temperature=1.0
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(causal_lm, sampler, network, seed=0)
    prompt = documents(1, 14)
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (1, 2, 2, 2)).astype("int32")
    rows, index = [prompt[0]], []
    for block, anchor in enumerate((5, 11)):
        for sample in range(2):
            row = np.zeros(14, "int32")
            row[:anchor] = prompt[0, :anchor]
            row[anchor : anchor + 2] = tokens[0, sample, block]
            rows.append(row)
            index.append((sample, block, anchor))
    x = {"token_ids": np.stack(rows), "padding_mask": np.ones((5, 14), "int32")}
    if "position_ids" in causal_lm.input:
        x["position_ids"] = np.broadcast_to(np.arange(14, dtype="int32"), (5, 14))
    weights = random.normal(size=(1, 2, 2, 2)).astype("float32")
    # Weights of the next token at each place of each row.
    placed = np.zeros((5, 13), "float32")
    placed[0] = 0.1
    for row, (sample, block, anchor) in enumerate(index, start=1):
        placed[row, anchor - 1 : anchor + 1] = weights[0, sample, block]

    def in_blocks():
        scores = model.score(prompt, tokens)
        documents = ops.sum(scores["document_log_prob"]) * 0.1
        return documents + ops.sum(ops.multiply(scores["log_prob"], weights))

    def alone():
        log_p = ops.log_softmax(plain_logits(causal_lm, x)[:, :-1], axis=-1)
        labels = x["token_ids"][:, 1:, None]
        log_p = ops.take_along_axis(log_p, labels, axis=-1)[..., 0]
        return ops.sum(ops.multiply(log_p, placed))

    variables = causal_lm.trainable_variables
    found, expected = gradients(in_blocks, variables), gradients(alone, variables)
    scale = np.abs(flat(expected)).max()
    np.testing.assert_allclose(flat(found) / scale, flat(expected) / scale, atol=2e-5)


def test_every_causal_lm_of_keras_hub_has_its_place():
    names = {name for name in dir(keras_hub.models) if name.endswith("CausalLM")}
    # A drafting model for Gemma 4, and the base class.
    names -= {"CausalLM", "Gemma4AssistantCausalLM"}
    placed = {*networks.FAMILIES, *networks.REFUSED}
    classes = {getattr(keras_hub.models, name).backbone_cls for name in names}
    assert {backbone.__name__ for backbone in classes} == placed
    tested = {name.split()[0].replace("Gemma2", "Gemma") for name in FAMILIES}
    assert {f"{name}Backbone" for name in tested} == set(networks.FAMILIES)
    for name, route in networks.FAMILIES.items():
        listed = {"serving": SERVING, "patched": PATCHED, "rows": ROWS}[route.route]
        assert name.removesuffix("Backbone") in listed


@pytest.mark.backend_independent
@pytest.mark.parametrize("name", FAMILIES)
def test_the_record_of_a_family_is_complete(name):
    """What a field left out would get wrong without an error."""
    backbone = family(name).backbone
    record = networks.family_of(backbone)
    depth = networks.num_layers(backbone)
    config = backbone.get_config()
    assert config[record.depth_setting] == depth
    per_layer = {
        setting
        for setting, value in config.items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }
    assert per_layer <= {*record.per_layer_settings, *NOT_PER_LAYER}
    known = inspect.signature(type(backbone)).parameters
    assert {*record.per_layer_settings, record.depth_setting} <= set(known)
    assert ("tie_word_embeddings" in known) == (record.tying_setting is not None)
    assert ("num_kv_shared_layers" in known) == (record.shared_setting is not None)
    assert networks.vocabulary_size(backbone) == VOCABULARY
    kernel = networks.output_head(backbone).kernel
    assert tuple(kernel.shape) == (VOCABULARY, record.output(backbone).shape[-1])
    # Learned positions are the one thing that limits a row.
    learned = [w for w in backbone.weights if "position_embedding" in w.path]
    limit = record.maximum_length(backbone)
    assert [w.shape[0] for w in learned] == ([] if limit is None else [limit])
    assert record.layout is None or record.layout in layouts.LAYOUTS


@pytest.mark.backend_independent
def test_the_table_in_the_docs_is_of_these_families():
    docs = Path(__file__).parent.parent / "docs"
    measured = json.loads((docs / "families.json").read_text())
    assert set(measured) == {"jax", "tensorflow", "torch"}
    lines = (docs / "families.md").read_text().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines}
    for name in FAMILIES:
        found = [measured[b].pop(name) for b in ("jax", "tensorflow", "torch")]
        assert rows[f"| {name}"].endswith(f" | {' | '.join(found)} |")
        assert max(map(float, found)) < 2e-5
    assert not any(measured.values())


@pytest.mark.slow_compiled
@pytest.mark.parametrize(
    ("name", "announced"), [("GptOss", ["GptOssBackbone"]), ("Llama", [])]
)
def test_slow_families_are_announced_once(name, announced, caplog):
    sampler = keras_ebft.BlockSampler(rollout_length=2, stride=6, num_samples=2)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(family(name, num_layers=1), sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.01))
    x = documents(2, 12)
    model.fit(x, batch_size=1, epochs=2, validation_data=x, verbose=0)
    model.rollout(x, seed=0)
    # TensorFlow has something to say of its own where many models were trained.
    own = [r for r in caplog.records if r.name.startswith("keras_ebft")]
    assert [r.getMessage().split()[0] for r in own] == announced


def test_other_families_are_named_in_the_error():
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=VOCABULARY,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=4,
        vit_patch_size=8,
        vit_num_layers=1,
        vit_num_heads=2,
        vit_hidden_dim=8,
        vit_intermediate_dim=16,
    )
    causal_lm = keras_hub.models.PaliGemmaCausalLM(None, backbone)
    with pytest.raises(ValueError, match=r"Llama3Backbone.*PaliGemmaBackbone.*images"):
        keras_ebft.EBFTModel(causal_lm)


def test_encoder_decoders_are_refused():
    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=1,
        hidden_dim=4,
        intermediate_dim=4,
    )
    model = keras_hub.models.BartSeq2SeqLM(backbone, None)
    with pytest.raises(ValueError, match=r"decoder-only.*BartSeq2SeqLM.*Llama3"):
        keras_ebft.EBFTModel(model)


@pytest.mark.slow_compiled
def test_the_text_model_of_a_multimodal_preset_is_loaded_as_the_error_says(tmp_path):
    """Every Gemma 3n preset has encoders; its text model is one of many parts."""
    encoder = {
        "hidden_size": 8,
        "input_feat_size": 32,
        "sscp_conv_channel_size": [4, 8],
        "sscp_conv_kernel_size": [(3, 3), (3, 3)],
        "sscp_conv_stride_size": [(2, 2), (2, 2)],
        "sscp_conv_group_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1.0,
        "residual_weight": 0.5,
        "num_attention_heads": 1,
        "attention_chunk_size": 4,
        "num_attention_context_right": 5,
        "num_attention_context_left": 5,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 5,
        "reduction_factor": 1,
    }
    whole = family("Gemma3n", audio_encoder_config=encoder, audio_hidden_size=8)
    remedy = r"Gemma3nBackbone with audio_encoder.*audio_encoder_config=None"
    with pytest.raises(ValueError, match=remedy):
        keras_ebft.EBFTModel(whole)
    whole.backbone.save_to_preset(str(tmp_path))
    backbone = keras_hub.models.Gemma3nBackbone.from_preset(
        str(tmp_path), vision_encoder_config=None, audio_encoder_config=None
    )
    pairs = zip(
        backbone.language_model.variables, whole.backbone.language_model.variables
    )
    for loaded, saved in pairs:
        np.testing.assert_array_equal(to_numpy(loaded.value), to_numpy(saved.value))
    causal_lm = keras_hub.models.Gemma3nCausalLM(None, backbone)
    keras_ebft.EBFTModel(causal_lm, seed=0).rollout(documents(1, 20), seed=0)


@pytest.mark.slow_compiled
@pytest.mark.parametrize("name", ["Gemma3n", "Gemma4 shared"])
def test_copies_that_follow_keep_what_lower_layers_read(name):
    """What all layers read of a token, side by side, is cut to the layers kept."""
    causal_lm = family(name)
    network = keras_ebft.FeatureNetwork(layers=(3,), ema_decay=0.0)
    sampler = keras_ebft.BlockSampler(rollout_length=3, stride=4, context_length=4)
    model = keras_ebft.EBFTModel(causal_lm, sampler, network, seed=0)
    prompt = documents(1, 18)
    rollouts = model.rollout(prompt, seed=1)
    before = target_at_layer_3(model, prompt, rollouts)
    randomise(causal_lm, seed=1)
    model.feature_reader.follow(causal_lm.backbone, decay=0.0)
    after = target_at_layer_3(model, prompt, rollouts)
    assert np.abs(after - before).max() > 0.1


def target_at_layer_3(model, prompt, rollouts):
    """Features of true continuations, compared with those of the whole model."""
    _, target = model.features(prompt, rollouts)
    backbone = model.causal_lm.backbone
    x = {"token_ids": prompt, "padding_mask": np.ones_like(prompt)}
    if type(backbone).__name__ == "Gemma3nBackbone":
        hidden = merged_streams(backbone, x, 3)
    else:
        x["position_ids"] = np.arange(prompt.shape[1], dtype="int32")[None]
        output = backbone.get_layer("decoder_block_2").output[0]
        hidden = keras.Model(backbone.input, output)(x, training=False)
    hidden = to_numpy(hidden)
    expected = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    anchors = model.sampler.geometry(prompt.shape[1]).anchors
    found = to_numpy(target)[:, :, 0]
    np.testing.assert_allclose(found, expected[:, anchors + 2], atol=1e-5)
    return found


def test_a_second_cap_on_logits_is_refused():
    causal_lm = keras_hub.models.Gemma4CausalLM(
        None, family("Gemma4").backbone, final_logit_cap=3.0
    )
    with pytest.raises(ValueError, match=r"Gemma4CausalLM.*final_logit_soft_cap"):
        keras_ebft.EBFTModel(causal_lm)


# None is what KerasHub's attention does in a family that it has not routed.
@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_does_not_route_attention_once_is_noticed(calls):
    model = keras_ebft.EBFTModel(llama(num_layers=4), seed=0)
    attention = model.causal_lm.backbone.transformer_layers[2]._self_attention_layer
    once = attention.call

    def call(hidden_states, **inputs):
        for _ in range(calls):
            hidden_states = once(hidden_states, **inputs)
        return hidden_states

    expected = rf"each of 4 layers of LlamaBackbone.*{calls} routed calls in layer 3"
    patch = (attention, "call", call)
    with patched([patch]), pytest.raises(ValueError, match=expected):
        model.rollout(documents(1, 20))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        (keras_hub, "0.99.0", r"keras-hub.*0\.32.*keras-hub 0\.99\.0.*pip install"),
        (keras_hub, "0.320.0", r"keras-hub 0\.320\.0"),
        (keras, "3.99.1", r"keras that.*3\.15.*keras 3\.99\.1.*\"keras==3\.15\.\*\""),
    ],
)
def test_untested_versions_are_refused(package, version, message, monkeypatch):
    monkeypatch.setattr(package, "__version__", version)
    with pytest.raises(ValueError, match=message):
        keras_ebft.EBFTModel(llama(num_layers=1))


def test_layers_above_the_last_tap_are_not_copied():
    causal_lm = llama(num_layers=8)
    model = keras_ebft.EBFTModel(causal_lm, seed=0)
    names = {layer.name for layer in model.frozen_network.layers}
    assert "transformer_layer_5" in names
    assert "transformer_layer_6" not in names
    # Nor is the untied output projection, which no feature needs.
    assert not any("reverse" in w.path for w in model.frozen_network.weights)
