"""Every family, tied or not, with adapters or without, loads as it was saved."""

import inspect
import itertools
import os

import keras
import keras_hub
import numpy as np
import pytest
from helpers import documents, family, to_numpy
from test_families import FAMILIES, plain_logits

import keras_ebft
from keras_ebft import networks
from keras_ebft.networks import adapters

# The same Python on every backend; tests/test_saving.py saves on all of them.
pytestmark = [
    pytest.mark.on_torch,
    pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package:UserWarning"),
]
X = documents(2, 12)
TYING = "tie_word_embeddings"
# The two whose configuration KerasHub leaves incomplete; all others are slow.
QUICK = ("Llama", "Llama3")
# Those whose adapters need names, because KerasHub has none for them.
NAMES = {
    "SmolLM3": ["q_proj", "v_proj"],
    "GPTNeoX": ["query_key_value"],
    "Gemma3n": ["q_proj", "v_proj"],
}


# What other families are saved as. Weights of mixed_bfloat16 are those of float32,
# and so is what is written.
EVERY = bool(os.environ.get("EVERY_TEST"))
WANTED = {
    (adapted, dtype): EVERY or adapted == (dtype == "bfloat16")
    for adapted in (False, True)
    for dtype in ("float32", "bfloat16")
}


def knows_tying(name):
    prefix = name.split()[0].replace("Gemma2", "Gemma")
    backbone = getattr(keras_hub.models, f"{prefix}Backbone")
    return TYING in inspect.signature(backbone).parameters


def rows():
    for name, adapted, dtype in itertools.product(
        FAMILIES, (False, True), ("float32", "bfloat16", "mixed_bfloat16")
    ):
        if name not in QUICK and not WANTED.get((adapted, dtype)):
            continue
        for tied in (True, False) if knows_tying(name) else (None,):
            plain = dtype == "float32" and (adapted or tied)
            quick = plain if name in QUICK else False
            words = {None: "", True: "-tied", False: "-untied"}[tied]
            yield pytest.param(
                name,
                {} if tied is None else {TYING: tied},
                adapted,
                dtype,
                id=f"{name}{words}-{'adapters' if adapted else 'plain'}-{dtype}",
                marks=[] if quick else [pytest.mark.slow],
            )


def adapt(backbone):
    """Adapters that count, and whose alpha is not the default."""
    name = type(backbone).__name__.removesuffix("Backbone")
    backbone.enable_lora(2, target_layer_names=NAMES.get(name))
    random = np.random.default_rng(1)
    for index, layer in enumerate(adapters.adapted_layers(backbone)):
        layer.lora_alpha = 5 + index
        shape = layer.lora_kernel_b.shape
        layer.lora_kernel_b.assign(0.3 * random.normal(size=shape))


def logits(causal_lm):
    x = {"token_ids": X, "padding_mask": np.ones_like(X)}
    if "position_ids" in causal_lm.backbone.input:
        x["position_ids"] = np.broadcast_to(np.arange(X.shape[1]), X.shape)
    return to_numpy(keras.ops.cast(plain_logits(causal_lm, x), "float32"))


@pytest.mark.parametrize(("name", "changes", "adapted", "dtype"), list(rows()))
def test_a_saved_model_has_the_same_logits(name, changes, adapted, dtype, tmp_path):
    causal_lm = family(name, dtype=dtype, **changes)
    if adapted:
        adapt(causal_lm.backbone)
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").causal_lm
    np.testing.assert_array_equal(logits(loaded), logits(causal_lm))
    if changes:
        assert loaded.backbone.token_embedding.tie_weights == changes[TYING]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("tied", [True, False])
def test_copies_and_presets_are_tied_as_the_model_is(name, tied, tmp_path):
    causal_lm = family(name, **{TYING: tied})
    features = keras_ebft.FeatureNetwork(network=family(name, **{TYING: tied}).backbone)
    model = keras_ebft.EBFTModel(causal_lm, feature_network=features, seed=0)
    copy = keras_ebft.EBFTModel.from_config(model.get_config())
    for backbone in (copy.causal_lm.backbone, copy.feature_network.network):
        assert backbone.token_embedding.tie_weights == tied
    causal_lm.backbone.save_to_preset(tmp_path)
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert loaded.token_embedding.tie_weights == tied
    assert networks.num_layers(loaded) == 2


def test_adapters_of_several_ranks_are_refused(tmp_path):
    causal_lm = family("Llama")
    causal_lm.backbone.enable_lora(2, target_layer_names=["query"])
    layer = next(
        layer
        for layer in adapters.layers_of(causal_lm.backbone)
        if layer.name == "value"
    )
    layer.enable_lora(3)
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    with pytest.raises(ValueError, match=r"one rank.*\[2, 3\]"):
        model.save(tmp_path / "model.keras")
