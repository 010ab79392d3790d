"""Cosines and sines of rotary embeddings, made once for all layers that share them.

KerasHub's layers make theirs anew for queries and for keys, in every layer: some
twenty operations each time, for the same numbers.
"""

import json

from keras_hub.layers import RotaryEmbedding

from keras_ebft.networks.patches import Patch


class RotaryTables:
    """What has been made for the tokens of one pass, by what it was made from.

    Layers share tables that run in one program. One that is traced by itself, such as
    the body of a loop, needs its own: what is made within does not leave it.
    """

    def __init__(self):
        self._found = {}

    def patches(self, decoder):
        """Patches with which the rotary embeddings in a layer read from here.

        Args:
            decoder: decoder layer; its embeddings are given the positions of the pass.

        Returns:
            list of `Patch`.
        """
        return [
            Patch(layer, "_compute_cos_sin_embedding", self._reader(layer))
            for layer in decoder._flatten_layers()
            if isinstance(layer, RotaryEmbedding)
        ]

    def _reader(self, layer):
        make, settings = layer._compute_cos_sin_embedding, _settings(layer)

        def read(inputs, start_index=0, positions=None):
            if positions is None:
                return make(inputs, start_index, positions)
            key = settings, len(inputs.shape), inputs.shape[-1]
            if key not in self._found:
                self._found[key] = make(inputs, start_index, positions)
            return self._found[key]

        return read


def _settings(layer):
    """Everything that tables follow from but tokens, as one string."""
    config = {**layer.get_config(), "name": None, "type": type(layer).__name__}
    return json.dumps(config, sort_keys=True, default=repr)
