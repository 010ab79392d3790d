"""Layouts of weights over devices, and the memory they take, of models not made."""

import math

import keras
import keras_hub
import pytest
from helpers import ROTARY, family

from keras_ebft import distribution

MESH = {"batch": 2, "model": 2}
# V x D twice, attention, feed-forward, norms, of two layers and one norm more.
VECTORS = 2 * 2 * 16 + 16
MATRICES = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
EMBEDDINGS = 2 * 32 * 16


def backbone(**changes):
    settings = {**ROTARY, "vocabulary_size": 32, **changes}
    return keras_hub.models.LlamaBackbone(**settings)


def mesh(**sizes):
    sizes = sizes or MESH
    count = math.prod(sizes.values())
    names = [f"cpu:{index}" for index in range(count)]
    return keras.distribution.DeviceMesh(tuple(sizes.values()), tuple(sizes), names)


def test_a_plan_counts_what_every_device_holds():
    alone = distribution.plan(backbone)
    values = EMBEDDINGS + MATRICES + VECTORS
    assert alone.weights == alone.gradients == 4 * values
    assert alone.optimizer == 2 * alone.weights
    # The copy needs no output embeddings here: features come from below the head.
    assert alone.frozen == 4 * (values - EMBEDDINGS // 2)
    assert alone.total == alone.whole
    parts = distribution.plan(backbone, MESH)
    assert parts.weights == 4 * ((EMBEDDINGS + MATRICES) // 4 + VECTORS)
    assert (parts.devices, parts.whole) == (4, alone.whole)
    copies = distribution.plan(backbone, MESH, sharded=False)
    assert copies.total == alone.whole


def test_a_plan_with_adapters_and_other_types():
    adapted = distribution.plan(backbone, lora_rank=3)
    assert (adapted.gradients, adapted.optimizer, adapted.frozen) == (0, 0, 0)
    # Of 16 x 4 x 4 and 16 x 2 x 4: rank times all axes but the last, and the last.
    of_layer = 3 * (16 * 4 + 4) + 3 * (16 * 2 + 4)
    assert adapted.adapters == 4 * 4 * 2 * of_layer
    half = distribution.plan(lambda: backbone(dtype="bfloat16"), slots=0)
    assert half.weights == 2 * (EMBEDDINGS + MATRICES + VECTORS)
    assert half.optimizer == 0
    assert "each of 4 devices" in str(distribution.plan(backbone, MESH))


def test_a_plan_of_a_model_that_no_memory_would_hold():
    def large():
        # Some two terabytes.
        return keras_hub.models.LlamaBackbone(
            vocabulary_size=2**18,
            num_layers=2,
            num_query_heads=2**8,
            num_key_value_heads=8,
            hidden_dim=2**17,
            intermediate_dim=2**19,
        )

    found = distribution.plan(large, {"batch": 64, "model": 8}, slots=0)
    assert found.weights > 2**30
    assert found.whole > 2**42


@pytest.mark.parametrize("name", ["Llama3", "Gemma3", "GPT2", "Mixtral", "Falcon"])
def test_a_map_names_the_weights_of_a_model_and_cuts_them(name):
    made = family(name).backbone
    found = distribution.layout_map(made, mesh())
    weights = {variable.path: variable for variable in made.weights}
    for path, layout in found.items():
        if "lora" in path:
            continue
        shape = weights[path].shape
        assert len(layout.axes) == len(shape)
        assert any(layout.axes)
        for axis, length in zip(layout.axes, shape):
            assert axis is None or length % MESH[axis] == 0
    cut = sum(math.prod(weights[path].shape) for path in found if path in weights)
    assert cut > 0.8 * made.count_params()


def test_a_map_has_output_embeddings_adapters_and_outputs():
    found = distribution.layout_map(backbone, mesh(), shard_outputs=True)
    query = "transformer_layer_1/self_attention/query"
    assert found["token_embedding/reverse_embeddings"].axes == ("batch", "model")
    assert found[f"{query}/lora_kernel_a"].axes == ("model", "batch", None)
    for layer in ("transformer_layer_1", "frozen_network/token_embedding"):
        assert found[f"{layer}/output"].axes == ("batch", None, None)
    assert found["transformer_layer_1/self_attention/output"] is None


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"axes 'batch' and 'model'.*'rows'"):
        distribution.layout_map(backbone, mesh(rows=2, model=2))
    with pytest.raises(ValueError, match=r"axes 'batch' and 'model'.*'rows'"):
        distribution.plan(backbone, {"rows": 2})
    with pytest.raises(TypeError, match="a function that makes one"):
        distribution.plan("gemma3_1b")
    with pytest.raises(TypeError, match="returned 3"):
        distribution.plan(lambda: 3)
    with pytest.raises(ValueError, match="at least 0"):
        distribution.plan(backbone, slots=-1)
