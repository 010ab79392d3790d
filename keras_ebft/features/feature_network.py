"""Features of rollouts and true continuations, from a frozen network."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_ebft.configurable import Configurable
from keras_ebft.features.callable_network import CallableNetwork
from keras_ebft.functional.pooling import NORM_EPSILON, POOLINGS, pool
from keras_ebft.layout.blocks import Blocks
from keras_ebft.layout.documents import take_tokens
from keras_ebft.networks import (
    RoutedNetwork,
    adapters,
    check_feature_backbone,
    complete_config,
    frozen_taps,
    num_layers,
)
from keras_ebft.networks.frozen_reader import FrozenReader
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_choice, check_int, check_number

DEFAULT_LAYERS = (0.25, 0.5, 0.75)
MODES = (
    "concat",
    "stack",
    "last",
    "mean",
    "middle",
    "middle_concat",
    "middle_stack",
)
LAYERED_MODES = ("concat", "stack")


@keras.saving.register_keras_serializable("keras_ebft")
class FeatureNetwork(Configurable):
    """What features are: which network and layers, how combined, how pooled.

    Hidden states are tapped after some decoder layers of a frozen network,
    L2-normalised per token in float32 and pooled over the tokens of a block
    (arXiv:2603.12248). Targets come from the same pass over the document. With L
    layers, counted from 1, the first decoder layer's output:

    | mode | features |
    |---|---|
    | `"concat"` | taps at `layers`, concatenated, then normalised: one of `taps * D` |
    | `"stack"` | taps at `layers`, each normalised: as many of D |
    | `"last"` | the last layer, after the final normalisation |
    | `"mean"` | mean of all layers, the last after the final normalisation |
    | `"middle"` | mean of layers `L // 2` and `L // 2 + 1` |
    | `"middle_concat"`, `"middle_stack"` | those two, concatenated or stacked |

    Args:
        layers: tuple of layers to tap with `"concat"` and `"stack"`; by default
            (0.25, 0.5, 0.75). A float f in (0, 1] means layer
            `max(1, floor(f * L))`; an int counts from 1. Layers above the highest
            tap are never run.
        mode: see the table.
        pooling: over the G tokens of a block: `"last_token"`, `"mean"`,
            `"concat"` (all of them, width `G` times larger) or `"token"`: every
            token is a feature, and gets a reward, of its own.
        network: where hidden states come from. `None`: a frozen copy of the
            policy, made when the `EBFTModel` is built. A KerasHub backbone of a
            supported family with the policy's vocabulary: frozen, tapped like the
            copy. Or any callable `network(token_ids, positions, attend=...)` that
            returns per-token features `[..., D]` or `[..., F, D]` for
            int32 `token_ids` and `positions` `[...]`. It runs twice per step, on
            documents and on rollouts, and reaches other tokens only through
            `attend(query, key, value, scale=...)`, which takes tensors
            `[..., heads, head_dim]` and must be called equally often each time.
            `layers` and `mode` are then its own business.
        ema_decay: float in [0, 1) or `None`: the copy follows the policy instead
            of staying frozen. At the beginning of every training step it becomes
            `ema_decay * copy + (1 - ema_decay) * policy`.

    Raises:
        TypeError: if a layer is neither an int nor a float, or `network` is
            neither a backbone nor callable.
        ValueError: for an empty `layers`, a layer out of range, an unknown name,
            or settings that do not go together.

    Example:
    >>> FeatureNetwork(layers=(0.25, 0.5, 0.75)).tapped_layers(num_layers=8)
    [2, 4, 6]
    """

    def __init__(
        self,
        layers: Sequence[int | float] | None = None,
        mode: str = "concat",
        pooling: str = "last_token",
        network: Callable[..., Any] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.mode = check_choice("mode", mode, MODES)
        if layers is not None and mode not in LAYERED_MODES:
            raise ValueError(
                f"Expected no `layers` with mode={mode!r}, which taps its own. "
                f"Received: layers={layers!r}. Leave them out, or use mode="
                '"concat" or "stack".'
            )
        self.layers = _check_layers(DEFAULT_LAYERS if layers is None else layers)
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        self.network = _check_network(network)
        self.ema_decay = None
        if ema_decay is not None:
            self.ema_decay = check_number("ema_decay", ema_decay, 0.0, 1.0 - 1e-9)
        self._check_combination(layers)

    def _check_combination(self, layers: Sequence[int | float] | None) -> None:
        if self.ema_decay is not None and self.network is not None:
            raise ValueError(
                "Expected `ema_decay` with a copy of the policy only. Received: "
                f"ema_decay={self.ema_decay} and a `network` of your own, which has "
                "no policy to follow. Leave one of them out."
            )
        own_features = self.network is not None and not _is_backbone(self.network)
        if own_features and (layers is not None or self.mode != "concat"):
            raise ValueError(
                "Expected no `layers` or `mode` with a callable `network`, which "
                f"returns features itself. Received: layers={layers!r}, "
                f"mode={self.mode!r}. Leave them out."
            )

    def tapped_layers(self, num_layers: int) -> list[int]:
        """The tapped layers of a network of `num_layers`, increasing, from 1.

        Raises:
            ValueError: if a layer lies above the network.
        """
        if self.mode == "last":
            return [num_layers]
        if self.mode == "mean":
            return list(range(1, num_layers + 1))
        if self.mode.startswith("middle"):
            middle = max(num_layers // 2, 1)
            return sorted({middle, min(middle + 1, num_layers)})
        return sorted({self._layer(layer, num_layers) for layer in self.layers})

    def _layer(self, layer: int | float, num_layers: int) -> int:
        if isinstance(layer, float):
            return max(1, min(num_layers, math.floor(layer * num_layers)))
        if layer > num_layers:
            raise ValueError(
                f"Expected `layers` within the network's {num_layers} layers. "
                f"Received: layer {layer} in layers={self.layers}. Tap a lower "
                "layer, or give fractions of the depth such as 0.5."
            )
        return layer

    @property
    def is_initial_model(self) -> bool:
        """Whether features come from the policy as it was at the start."""
        return self.network is None and self.ema_decay is None

    def freeze(
        self, backbone: keras_hub.models.Backbone, with_reference: bool = False
    ) -> FrozenReader:
        """A reader of the frozen network, which knows its taps.

        Args:
            backbone: the policy's backbone.
            with_reference: bool, whether the same copy also is the reference model:
                it then runs to its end, and has an output head.

        Returns:
            `FrozenReader`.

        Raises:
            ValueError: if a network of the user's own does not fit the policy.
        """
        if self.network is not None and not _is_backbone(self.network):
            return FrozenReader(CallableNetwork(self.network), tap_slots=(0,))
        if self.network is not None:
            check_feature_backbone(self.network, backbone)
            complete_config(self.network)
            backbone = self.network
        if self.ema_decay is not None and adapters.adapted_layers(backbone):
            raise ValueError(
                "Expected a model without adapters with `ema_decay`: its feature "
                "network is its own base, which does not move. Received: "
                f"ema_decay={self.ema_decay} and a {type(backbone).__name__} with "
                "adapters. Leave one of them out."
            )
        depth = num_layers(backbone)
        tapped = self.tapped_layers(depth)
        read = sorted({*tapped, depth}) if with_reference else tapped
        return FrozenReader(
            frozen_taps(backbone, read, with_head=with_reference),
            tap_slots=[read.index(layer) for layer in tapped],
            reference_slot=read.index(depth) if with_reference else None,
        )

    @property
    def is_live(self) -> bool:
        """Whether the network that features come from moves with the policy."""
        return self.ema_decay is not None

    def generated(
        self, rollout_taps: list[Tensor], token_mask: Tensor, alive: Tensor
    ) -> Tensor:
        """Features of every rollout.

        Args:
            rollout_taps: list of float tensors `[B, n, K, G, D]`, the frozen network's
                outputs for rollouts.
            token_mask: bool tensor `[B, n, K, G]`, generated tokens that count.
            alive: bool tensor `[B, n, K, G]`, generated tokens that are there.

        Returns:
            float32 tensor `[B, n, K, F, D]`; with `"token"` pooling
            `[B, n, K, G, F, D]`.
        """
        return pool(self._features(rollout_taps), token_mask, alive, self.pooling)

    def target(self, document_taps: list[Tensor], blocks: Blocks) -> Tensor:
        """Features of every true continuation.

        Args:
            document_taps: list of float tensors `[B, T, D]`, the frozen network's
                outputs for documents.
            blocks: `Blocks`.

        Returns:
            float32 tensor `[B, K, F, D]`; with `"token"` pooling `[B, K, G, F, D]`.
        """
        return pool(
            self._features([take_tokens(t, blocks.true_index) for t in document_taps]),
            blocks.true_counted,
            blocks.true_exists,
            self.pooling,
        )

    def num_features(self, network: Any, rollout_length: int) -> int:
        """Numbers in one window's features, `F * D`, over all features.

        Raises:
            ValueError: for a callable network, which does not say.
        """
        if not isinstance(network, RoutedNetwork):
            raise ValueError(
                "Expected a feature network made of a backbone, whose width is known. "
                "Received: a callable `network`. Leave the critic out, or pass a "
                "KerasHub backbone."
            )
        widths = [output.shape[-1] for output in network.model.outputs]
        width = widths[0] if self.mode in ("last", "mean", "middle") else sum(widths)
        return width * rollout_length if self.pooling == "concat" else width

    def _features(self, taps: list[Tensor]) -> Tensor:
        """Taps `[..., D]` as normalised per-token features `[..., F, D']`."""
        if self.network is not None and not _is_backbone(self.network):
            return _normalise(ops.cast(taps[0], "float32"))
        taps = [ops.cast(tap, "float32") for tap in taps]
        if self.mode in ("concat", "middle_concat"):
            taps = [ops.concatenate(taps, axis=-1)]
        elif self.mode in ("mean", "middle"):
            taps = [sum(taps[1:], start=taps[0]) / len(taps)]
        return _normalise(ops.stack(taps, axis=-2))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        network = self.network
        if network is not None:
            network = keras.saving.serialize_keras_object(network)
        return {
            "layers": list(self.layers) if self.mode in LAYERED_MODES else None,
            "mode": self.mode,
            "pooling": self.pooling,
            "network": network,
            "ema_decay": self.ema_decay,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FeatureNetwork":
        """Builds the object from what `get_config` returned."""
        network = config.get("network")
        if isinstance(network, dict):
            network = keras.saving.deserialize_keras_object(network)
        if network is not None and not _is_backbone(network):
            config = {**config, "layers": None}
        return cls(**{**config, "network": network})


def _is_backbone(network: Any) -> bool:
    return isinstance(network, keras_hub.models.Backbone)


def _normalise(vectors: Tensor) -> Tensor:
    square = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    # Before the root, whose derivative at 0 is infinite.
    return vectors / ops.sqrt(ops.maximum(square, NORM_EPSILON**2))


def _check_network(network: Any) -> Any:
    if network is None or callable(network):
        return network
    raise TypeError(
        "Expected `network` to be None, a KerasHub backbone or a callable "
        f"(token_ids, positions, attend). Received: {network!r} (of type "
        f"{type(network).__name__})."
    )


def _check_layers(layers: Any) -> tuple[int | float, ...]:
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            "Expected `layers` to be a non-empty tuple of layers to tap. Received: "
            f"layers={layers!r}. Pass for example layers=(0.25, 0.5, 0.75)."
        )
    return tuple(_check_layer(layer) for layer in layers)


def _check_layer(layer: Any) -> int | float:
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
