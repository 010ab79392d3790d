"""Configurations of backbones that say everything a copy needs.

KerasHub's Llama and Llama 3 leave out whether the output projection is the embedding:
such a model does not load again, and a copy of it has a projection of its own.
"""

import functools

from keras_ebft.networks.families import family_of


def complete_config(backbone):
    """Makes a backbone's configuration say whether its embeddings are tied.

    For as long as the backbone lives, and for whoever asks: `save`, `from_config` and
    `save_to_preset` of the models it is a part of.

    Args:
        backbone: KerasHub backbone of a supported family.
    """
    setting = family_of(backbone).tying_setting
    if setting is None or setting in backbone.get_config():
        return
    # Past the trackers of Keras, which would keep the function.
    whole = functools.partial(_config, backbone.get_config, backbone, setting)
    object.__setattr__(backbone, "get_config", whole)


def _config(get_config, backbone, setting):
    return {**get_config(), setting: backbone.token_embedding.tie_weights}
