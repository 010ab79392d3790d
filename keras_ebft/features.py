"""Features of rollouts and true continuations, from a frozen copy of the model."""

import math
import numbers

import keras
from keras import ops

from keras_ebft import bridge
from keras_ebft.configurable import Configurable
from keras_ebft.prefix_cache import read_blocks, read_document
from keras_ebft.validation import check_choice, check_int

MODES = ("concat", "stack")
POOLINGS = ("last_token", "mean", "concat")
NORM_EPSILON = 1e-12


@keras.saving.register_keras_serializable("keras_ebft")
class FeatureNetwork(Configurable):
    """What features are: which layers, how combined, how pooled.

    Hidden states are tapped after some decoder layers of a frozen copy of the
    model, L2-normalised per token in float32 and pooled over the G tokens of a
    block (arXiv:2603.12248). Targets come from the same pass over the document.

    Args:
        layers: tuple of layers to tap. A float f in (0, 1] means layer
            `max(1, floor(f * L))` of L; an int counts from 1, the first decoder
            layer's output. Layers above the highest tap are never run.
        mode: `"concat"`: taps concatenated and then normalised, one feature of
            width `taps * D`. `"stack"`: one feature of width D per tap, each
            normalised.
        pooling: `"last_token"`, `"mean"` (over the normalised tokens of a block)
            or `"concat"` (all of them, width `G` times larger).

    Raises:
        TypeError: if a layer is neither an int nor a float.
        ValueError: for an empty `layers`, a layer out of range or an unknown
            `mode` or `pooling`.

    Example:
    >>> FeatureNetwork(layers=(0.25, 0.5, 0.75)).tapped_layers(num_layers=8)
    [2, 4, 6]
    """

    def __init__(self, layers=(0.25, 0.5, 0.75), mode="concat", pooling="last_token"):
        self.layers = _check_layers(layers)
        self.mode = check_choice("mode", mode, MODES)
        self.pooling = check_choice("pooling", pooling, POOLINGS)

    def tapped_layers(self, num_layers):
        """The tapped layers of a network of `num_layers`, increasing, from 1.

        Raises:
            ValueError: if a layer lies above the network.
        """
        taps = []
        for layer in self.layers:
            if isinstance(layer, float):
                taps.append(max(1, min(num_layers, math.floor(layer * num_layers))))
            elif layer <= num_layers:
                taps.append(layer)
            else:
                raise ValueError(
                    f"Expected `layers` within the network's {num_layers} layers. "
                    f"Received: layer {layer} in layers={self.layers}. Tap a lower "
                    "layer, or give fractions of the depth such as 0.5."
                )
        return sorted(set(taps))

    def freeze(self, backbone):
        """Copies the tapped part of `backbone` into a frozen `RoutedNetwork`."""
        return bridge.frozen_taps(backbone, self.tapped_layers(backbone.num_layers))

    def __call__(self, frozen, token_ids, rollout_ids, geometry):
        """Features of every rollout and of every true continuation.

        Args:
            frozen: `RoutedNetwork` from `freeze`.
            token_ids: int32 tensor `[B, T]`, documents.
            rollout_ids: int32 tensor `[B, n, K, G]`.
            geometry: `BlockGeometry`.

        Returns:
            `(generated, target)`: float32 `[B, n, K, F, D]` and `[B, K, F, D]`.
        """
        document = read_document(frozen, token_ids)
        generated = read_blocks(frozen, document, rollout_ids, geometry.anchors)
        target = [
            ops.take(tap, geometry.positions, axis=1) for tap in _taps(document.outputs)
        ]
        return self._pool(_taps(generated)), self._pool(target)

    def _pool(self, taps):
        """`[..., G, D]` hidden states to `[..., F, D']` features."""
        taps = [ops.cast(tap, "float32") for tap in taps]
        if self.mode == "concat":
            taps = [ops.concatenate(taps, axis=-1)]
        tokens = _normalise(ops.stack(taps, axis=-2))
        if self.pooling == "last_token":
            return tokens[..., -1, :, :]
        if self.pooling == "mean":
            return ops.mean(tokens, axis=-3)
        *lead, steps, features, width = tokens.shape
        tokens = ops.swapaxes(tokens, -3, -2)
        return ops.reshape(tokens, (*lead, features, steps * width))

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "layers": list(self.layers),
            "mode": self.mode,
            "pooling": self.pooling,
        }


def _taps(outputs):
    return outputs if isinstance(outputs, (list, tuple)) else [outputs]


def _normalise(vectors):
    norm = ops.sqrt(ops.sum(ops.square(vectors), axis=-1, keepdims=True))
    return vectors / ops.maximum(norm, NORM_EPSILON)


def _check_layers(layers):
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            "Expected `layers` to be a non-empty tuple of layers to tap. Received: "
            f"layers={layers!r}. Pass for example layers=(0.25, 0.5, 0.75)."
        )
    return tuple(_check_layer(layer) for layer in layers)


def _check_layer(layer):
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        return check_int("layers", layer, 1)
    if not isinstance(layer, float):
        raise TypeError(
            "Expected each of `layers` to be an int (counted from 1) or a float (a "
            f"fraction of the depth). Received: {layer!r} (of type "
            f"{type(layer).__name__})."
        )
    if not 0.0 < layer <= 1.0:
        raise ValueError(
            "Expected fractions in `layers` to be in (0, 1]. Received: "
            f"{layer}. Pass a fraction such as 0.5, or an int such as 4."
        )
    return layer
