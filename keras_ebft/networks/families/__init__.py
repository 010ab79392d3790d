"""What this library knows of KerasHub's families: one record each, nowhere else.

To add a family, do:

1. write a `Family` in the file of its kind here, or in a new one: fields left out are
   what most backbones do; `attention=None` runs whole rows, which is always right;
2. list the file in `_FILES` below, if it is new;
3. add a tiny model to `family` in `tests/helpers.py`, with its windows and caps, and
   its name to `SERVING`, `PATCHED` or `ROWS` in `tests/test_families.py`;
4. run `python -m pytest tests/test_families.py -m "" -k Name` on all three backends: it
   compares numbers and gradients with each block run alone;
5. run `python docs/make_family_table.py --measure` on each, for `docs/families.md`.

A family's decoder layers are called one after another by `RoutedNetwork`, with the
caller's attention in each. Those on whole rows (`rows`, and Phi-3 with a long rotary
embedding) run as KerasHub's own graph; that file says what keeps each there.
"""

from keras_ebft.networks.families import alibi, gemma3n, rotary, rows, serving
from keras_ebft.networks.families.family import Family, OutputHead

_FILES = (serving, alibi, gemma3n, rotary, rows)

FAMILIES = {record.backbone: record for file in _FILES for record in file.FAMILIES}

# What KerasHub calls a CausalLM and this library cannot train, with the reason.
REFUSED = {
    "BLIP2Backbone": "it continues images, which documents of text do not have",
    "PaliGemmaBackbone": "it continues images, which documents of text do not have",
    "PARSeqBackbone": "it reads images, which documents of text do not have",
}

# Models of supported backbones that are not what they seem, with what to do instead.
REFUSED_MODELS = {
    "Gemma4AssistantCausalLM": "it drafts for another model. Train the Gemma4CausalLM "
    "it assists",
}

__all__ = [
    "FAMILIES",
    "REFUSED",
    "REFUSED_MODELS",
    "Family",
    "OutputHead",
    "family_of",
    "family_of_preprocessor",
    "num_layers",
    "parts_of",
]


def family_of(backbone):
    """The `Family` of a backbone.

    Raises:
        ValueError: if it is not supported; the message says why.
    """
    name = type(backbone).__name__
    if name in FAMILIES:
        return FAMILIES[name].for_backbone(backbone)
    reason = f", because {REFUSED[name]}" if name in REFUSED else ""
    raise ValueError(
        f"Expected a backbone of a supported family: {', '.join(FAMILIES)}. "
        f"Received: {name}{reason}. Use a model of one of these families."
    )


def family_of_preprocessor(preprocessor):
    """The `Family` a preprocessor is for, or `None` for one it does not say."""
    backbone = getattr(preprocessor, "backbone_cls", None)
    return None if backbone is None else FAMILIES.get(backbone.__name__)


def num_layers(backbone):
    """Number of decoder layers of a backbone."""
    return len(family_of(backbone).decoder_layers(backbone))


def parts_of(network):
    """The layers of a backbone or of a model made of its layers, some maybe missing."""
    family = FAMILIES.get(type(network).__name__)
    return network.layers if family is None else family.parts(network)
