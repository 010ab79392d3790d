"""Networks of families that only run whole rows, as KerasHub's own graph."""

import keras
from keras import ops

from keras_ebft.networks import adapters
from keras_ebft.networks.families import family_of
from keras_ebft.networks.layer_patches import without_remat_scope
from keras_ebft.networks.layer_powers import powers_by_numbers
from keras_ebft.networks.patches import Patch, patched
from keras_ebft.networks.rematerialisation import run_again


class RowNetwork:
    """A backbone, or the lower part of one, that only runs whole rows.

    Args:
        model: `keras.Model` that maps a backbone's inputs to hidden states.
        backbone: the backbone whose layers these are.
        num_layers: int, decoder layers in `model`.
        switched_off: layers whose adapters take no part.
        rematerialize: bool, whether decoder layers run again in the backward pass.
    """

    def __init__(
        self, model, backbone, num_layers, switched_off=(), rematerialize=False
    ):
        self.model = model
        self.backbone = backbone
        self.num_layers = num_layers
        self.switched_off = switched_off
        self.rematerialize = rematerialize

    def __call__(self, token_ids):
        """Runs the network causally over rows.

        Args:
            token_ids: int32 tensor `[*rows, T]`.

        Returns:
            The model's outputs, each `[*rows, T, D]`.
        """
        *lead, length = token_ids.shape
        rows = ops.reshape(token_ids, (-1, length))
        inputs = {"token_ids": rows, "padding_mask": ops.ones_like(rows)}
        if "position_ids" in self.model.input:
            index = ops.arange(length, dtype="int32")
            inputs["position_ids"] = ops.broadcast_to(index[None], rows.shape)
        patches = _patches(self.backbone)
        if self.rematerialize:
            patches += [Patch(d, "call", _again(d)) for d in self._decoders()]
        with adapters.switched_off(self.switched_off), patched(patches):
            outputs = self.model(inputs, training=False)
        return keras.tree.map_structure(
            lambda output: ops.reshape(output, (*lead, length, output.shape[-1])),
            outputs,
        )

    def _decoders(self):
        decoders = family_of(self.backbone).decoder_layers(self.backbone)
        return decoders[: self.num_layers]


def _patches(whole):
    """What a layer and those in it run with, whatever the family."""
    return [*without_remat_scope(whole), *powers_by_numbers(whole)]


def _again(decoder):
    """A `call` that runs a decoder layer again in the backward pass."""
    call = decoder.call

    def run(args, kwargs):
        # The whole layer, not `call` alone: it sets the precision of its weights.
        patches = [*_patches(decoder), Patch(decoder, "call", call)]
        with patched(patches):
            return decoder(*args, **kwargs)

    def call_again(*args, **kwargs):
        return run_again(run)(args, kwargs)

    return call_again
