"""What is changed in KerasHub for the length of a call is afterwards as it was."""

import keras
import numpy as np
import pytest
from helpers import documents, family, to_numpy
from keras import ops
from test_families import FAMILIES

from keras_ebft import networks
from keras_ebft.backend.runtime import power
from keras_ebft.networks import adapters
from keras_ebft.networks.layer_powers import powers_by_numbers
from keras_ebft.networks.patches import patched

# RWKV-7 says that kernels of a package of its own would be faster.
pytestmark = pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package:UserWarning")


# One family for each kind of patch.
QUICK = ("Llama", "Falcon", "Gemma3n", "SmolLM3")


class Owner:
    setting = "of the class"

    def __init__(self):
        self.own = "of the instance"


def test_patches_hold_within_and_are_gone_afterwards():
    owner = Owner()
    patches = [
        (owner, "own", 1),
        (owner, "setting", 2),
        (owner, "own", 3),
        (owner, "new", 4),
    ]
    before = dict(vars(owner))
    with patched(patches):
        assert (owner.own, owner.setting, owner.new) == (3, 2, 4)
    assert vars(owner) == before
    assert owner.setting == "of the class"
    with pytest.raises(KeyError), patched(patches):
        raise KeyError
    assert vars(owner) == before


def test_a_patch_that_cannot_be_made_undoes_those_before_it():
    owner = Owner()
    before = dict(vars(owner))
    with pytest.raises(TypeError), patched([(owner, "own", 1), (5, "own", 1)]):
        pass
    assert vars(owner) == before


def attributes(backbone):
    """Everything the layers of a backbone have, by identity."""
    layers = [backbone, *adapters.layers_of(backbone)]
    return [{name: id(v) for name, v in vars(layer).items()} for layer in layers]


class CutShortError(Exception):
    pass


def interrupt(*_, **__):
    raise CutShortError


def run(network):
    """Runs a network on a few tokens that do not see each other."""
    tokens = ops.convert_to_tensor(documents(1, 6))
    if isinstance(network, networks.RowNetwork):
        return network(tokens)
    return network(tokens, tokens, lambda query, *_, **__: (query, None))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in QUICK
        else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.on_torch])
        for name in FAMILIES
    ],
)
def test_every_layer_is_unchanged_afterwards(name):
    """Also after an exception, with everything on that is patched for."""
    with keras.RematScope(mode="full"):
        backbone = family(name).backbone
    if name == "Llama":
        quantize(backbone)
    for network in (
        networks.routed_backbone(backbone, rematerialize=True),
        networks.routed_backbone(backbone),
    ):
        run(network)
        before = attributes(backbone)
        run(network)
        assert attributes(backbone) == before
        last = networks.family_of(backbone).decoder_layers(backbone)[-1]
        with patched([(last, "call", interrupt)]), pytest.raises(CutShortError):
            run(network)
        assert attributes(backbone) == before


def quantize(backbone):
    """Quantizes one projection of every layer, which needs adapters to train."""
    backbone.quantize("int8", filters="query")
    backbone.enable_lora(2)


class Cubes(keras.layers.Layer):
    def call(self, inputs, *, factor=2.0):
        return factor * ops.power(inputs, 3) + ops.power(2.0, inputs)


class NestedCubes(Cubes):
    """Calls what is above it, by a cell of its function."""

    def call(self, inputs, offset=1.0):
        return super().call(inputs) + ops.power(inputs, 0.5) + offset


def test_layers_take_powers_by_numbers():
    layer = NestedCubes()
    x = ops.convert_to_tensor([0.25, 4.0])
    expected = [2 * 0.25**3 + 2**0.25 + 0.5 + 1, 2 * 4**3 + 2**4 + 2 + 1]
    before = layer.call
    with patched(powers_by_numbers(layer)):
        assert layer.call.__func__ is not before.__func__
        np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-6)
        np.testing.assert_allclose(
            to_numpy(layer(x, offset=2.0)), [value + 1 for value in expected], rtol=1e-6
        )
    assert layer.call == before
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Elsewhere exponents are constants."
)
@pytest.mark.parametrize("exponent", [2, 2.0, -1.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_exponents_are_not_copied_to_the_device(exponent, dtype, monkeypatch):
    import torch

    x = ops.convert_to_tensor([1, 3], dtype=dtype)
    plain = ops.power(x, exponent)
    monkeypatch.setattr(torch, "as_tensor", None)
    found = power(x, exponent)
    assert found.dtype == plain.dtype
    np.testing.assert_allclose(to_numpy(found), to_numpy(plain), rtol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Elsewhere exponents are constants."
)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "Phi3", "GptOss"])
def test_networks_take_squares_by_numbers(name):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Exponents(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("aten.pow."):
                exponents.append(args[1])
            return function(*args, **(kwargs or {}))

    exponents, network = [], networks.routed_backbone(family(name).backbone)
    with Exponents():
        run(network)
    # Rotary embeddings take powers of a number by many.
    alone = [e for e in exponents if not getattr(e, "shape", ())]
    # Two normalisations in every layer, and one at the end.
    assert len(alone) >= 5
    assert all(isinstance(exponent, int) for exponent in alone)
