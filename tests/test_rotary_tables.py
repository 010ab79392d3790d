"""Layers share cosines and sines, where they would make the same ones."""

import numpy as np
import pytest
from helpers import documents, family, to_numpy
from keras import ops
from keras_hub.layers import RotaryEmbedding

from keras_ebft import networks
from keras_ebft.layout.documents import read_documents
from keras_ebft.networks.prefix_cache import read_document
from keras_ebft.training.batches import as_batch

LAYERS = 3
TOKENS = documents(2, 9)


@pytest.fixture
def made(monkeypatch):
    """The wavelength of every table that is made."""
    wavelengths = []
    for owner in (RotaryEmbedding, *RotaryEmbedding.__subclasses__()):
        if "_get_inverse_freq" in vars(owner):
            monkeypatch.setattr(owner, "_get_inverse_freq", watch(owner, wavelengths))
    return wavelengths


def watch(owner, wavelengths):
    plain = owner._get_inverse_freq

    def watched(self, rotary_dim):
        wavelengths.append(self.max_wavelength)
        return plain(self, rotary_dim)

    return watched


def read(backbone, **options):
    network = networks.routed_backbone(backbone, **options)
    documents = read_documents(as_batch({"token_ids": TOKENS}))
    return to_numpy(read_document(network, documents).outputs)


def expected(backbone):
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    return to_numpy(backbone(inputs))


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX"])
def test_one_table_serves_all_layers(name, made):
    backbone = family(name, num_layers=LAYERS).backbone
    plain = expected(backbone)
    made.clear()
    np.testing.assert_allclose(read(backbone), plain, atol=1e-5)
    assert len(made) == 1


def test_layers_with_other_settings_have_their_own(made):
    backbone = family("Llama", num_layers=LAYERS).backbone
    attention = backbone.transformer_layers[1]._self_attention_layer
    attention.rotary_embedding_layer.max_wavelength = 20.0
    plain = expected(backbone)
    made.clear()
    found = read(backbone)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    assert sorted(made) == [20.0, 10000]
    attention.rotary_embedding_layer.max_wavelength = 10000
    assert np.abs(found - expected(backbone)).max() > 1e-3


def test_layers_that_run_again_make_their_own(made):
    """Tables do not leave the program that they are made in."""
    backbone = family("Llama", num_layers=LAYERS).backbone
    read(backbone, rematerialize=True)
    assert len(made) == LAYERS


def test_another_pass_makes_its_own(made):
    backbone = family("Llama", num_layers=LAYERS).backbone
    network = networks.routed_backbone(backbone)

    def attend(query, key, value, cache, **_):
        return query, None

    tokens = ops.convert_to_tensor(TOKENS)
    made.clear()
    near, far = (
        to_numpy(network(tokens, ops.zeros_like(tokens) + place, attend)[0])
        for place in (0, 5)
    )
    assert len(made) == 2
    assert np.abs(near - far).max() > 1e-3


def test_no_mask_is_made_that_nothing_reads(monkeypatch):
    from keras_hub.src.models.llama import llama_decoder

    backbone = family("Llama", num_layers=LAYERS).backbone
    plain = expected(backbone)
    monkeypatch.setattr(llama_decoder, "compute_causal_mask", None)
    np.testing.assert_allclose(read(backbone), plain, atol=1e-5)
    with pytest.raises(TypeError):
        expected(backbone)
