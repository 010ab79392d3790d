"""What is changed in KerasHub for the length of a call is afterwards as it was."""

import keras
import pytest
from helpers import documents, family
from keras import ops
from test_families import FAMILIES

from keras_ebft import networks
from keras_ebft.networks import adapters
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
