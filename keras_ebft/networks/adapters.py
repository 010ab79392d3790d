"""Low-rank adapters (LoRA): which layers have them, and the base beneath them.

Keras adds `alpha / rank * A @ B` to the kernel of every adapted layer. The frozen
network and the reference of the KL term are the same weights without that sum, so
a model with adapters needs no second copy of its base.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

# What an adapted layer computes with, quantized or not, next to its bias.
BASE_VARIABLES = ("_kernel", "kernel_scale", "kernel_zero")
ADAPTER_VARIABLES = ("lora_kernel_a", "lora_kernel_b")


def adapted_layers(backbone: keras_hub.models.Backbone) -> list[keras.Layer]:
    """The layers of a backbone that have adapters, in a fixed order."""
    return [layer for layer in layers_of(backbone) if getattr(layer, "lora_rank", None)]


def freeze_base(backbone: keras_hub.models.Backbone) -> None:
    """Leaves only adapters trainable.

    `enable_lora` freezes every layer without adapters, and the kernel of those
    with them, but not their biases: training those would train the base.

    Args:
        backbone: KerasHub backbone, with adapters or without (left alone).

    Raises:
        ValueError: if `enable_lora` found no layer to adapt, or a weight other
            than an adapter and its layer's bias is trainable.
    """
    layers = adapted_layers(backbone)
    if not layers:
        _check_enable_lora_found_layers(backbone)
        return
    for layer in layers:
        if not hasattr(layer, "lora_kernel_a"):
            raise ValueError(
                "Expected adapters on dense layers. Received: adapters on "
                f"'{layer.path}', a {type(layer).__name__}, whose base the output "
                "head shares. Choose others with "
                'enable_lora(rank, target_layer_names=["query", "value"]).'
            )
        if layer.bias is not None:
            layer.bias.trainable = False
    adapters = {id(variable) for variable in adapter_variables(layers)}
    others = [v.path for v in backbone.trainable_variables if id(v) not in adapters]
    if others:
        raise ValueError(
            "Expected adapters alone to be trainable, because the frozen network is "
            f"the same weights without them. Received: trainable {others[0]} and "
            f"{len(others) - 1} more in {type(backbone).__name__}. Enable adapters "
            "with backbone.enable_lora(rank), which freezes the rest."
        )


def adapter_variables(layers: Iterable[keras.Layer]) -> list[keras.Variable]:
    """The trainable variables of adapted layers."""
    return [getattr(layer, name) for layer in layers for name in ADAPTER_VARIABLES]


def alphas(backbone: keras_hub.models.Backbone) -> list[float]:
    """How much the adapters of every adapted layer count, times its rank."""
    return [float(layer.lora_alpha) for layer in adapted_layers(backbone)]


def are_trained(backbone: keras_hub.models.Backbone) -> bool:
    """Whether any adapter changes its layer; new ones, whose B is 0, do not."""
    return any(
        np.any(ops.convert_to_numpy(layer.lora_kernel_b))
        for layer in adapted_layers(backbone)
    )


@contextlib.contextmanager
def switched_off(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Context in which adapted layers compute with their base alone."""
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


@contextlib.contextmanager
def merged(backbone: keras_hub.models.Backbone) -> Iterator[None]:
    """Context in which kernels hold their adapters and nothing is adapted.

    For what reads kernels as they are. Afterwards base and adapters are apart
    again, bit for bit.

    Args:
        backbone: KerasHub backbone, not quantized.
    """
    layers = adapted_layers(backbone)
    bases = [layer._kernel.numpy() for layer in layers]
    for layer in layers:
        layer._kernel.assign(layer.kernel)
    try:
        with switched_off(layers):
            yield
    finally:
        for layer, base in zip(layers, bases):
            layer._kernel.assign(base)


def exact_variables(backbone: keras_hub.models.Backbone) -> dict[str, keras.Variable]:
    """Base and adapters as they are, by name.

    Keras saves an adapted layer as one kernel with the adapter merged in, and
    loads that as the base, next to adapters of zero. To go on training, base and
    adapters are needed apart.

    Args:
        backbone: KerasHub backbone.

    Returns:
        dict of Keras variables, empty without adapters.
    """
    names = BASE_VARIABLES + ADAPTER_VARIABLES
    return {
        f"adapter_{index}_{name.lstrip('_')}": getattr(layer, name)
        for index, layer in enumerate(adapted_layers(backbone))
        for name in names
        if getattr(layer, name, None) is not None
    }


def adapter_config(backbone: keras_hub.models.Backbone) -> dict[str, Any] | None:
    """What `enable_lora` was called with, or `None` for a model without adapters.

    Returns:
        dict of `rank`, `target_layer_names` and `alpha`, one per adapted layer.

    Raises:
        ValueError: if layers have adapters of several ranks.
    """
    layers = adapted_layers(backbone)
    if not layers:
        return None
    ranks = sorted({layer.lora_rank for layer in layers})
    if len(ranks) > 1:
        raise ValueError(
            "Expected adapters of one rank, which a saved model can say. Received: "
            f"ranks {ranks}. Enable all with backbone.enable_lora(rank)."
        )
    return {
        "rank": ranks[0],
        "target_layer_names": sorted({layer.name for layer in layers}),
        "alpha": [layer.lora_alpha for layer in layers],
    }


def enable_adapters(
    backbone: keras_hub.models.Backbone, config: dict[str, Any] | None
) -> None:
    """Enables the adapters that `adapter_config` described, unless there are any."""
    if config is None or adapted_layers(backbone):
        return
    config = dict(config)
    # Files of earlier versions do not say it.
    alphas = config.pop("alpha", None)
    backbone.enable_lora(**config)
    layers = adapted_layers(backbone)
    for layer, alpha in zip(layers, alphas or [], strict=bool(alphas)):
        layer.lora_alpha = alpha


def refuse_new(backbone: keras_hub.models.Backbone, count: int) -> None:
    """Raises a `ValueError` if layers got adapters after a model was built on them.

    Its frozen network is a copy, its optimizer trains what was trainable then, and
    its files would be read as another model's.

    Args:
        backbone: KerasHub backbone.
        count: int, how many adapted layers it had then.
    """
    found = len(adapted_layers(backbone))
    if found != count:
        raise ValueError(
            f"Expected the {count} adapted layers that the backbone had when the "
            f"EBFTModel was made. Received: {found}, after a later enable_lora(). Make "
            "the EBFTModel anew, after causal_lm.backbone.enable_lora(rank)."
        )


def _check_enable_lora_found_layers(backbone: keras_hub.models.Backbone) -> None:
    if not getattr(backbone, "_lora_rank", None):
        return
    candidates = sorted(
        {
            layer.name
            for layer in layers_of(backbone)
            if hasattr(layer, "enable_lora") and hasattr(layer, "kernel")
        }
    )
    raise ValueError(
        "Expected enable_lora() to find layers to adapt. Received: a "
        f"{type(backbone).__name__} in which no layer has one of the names "
        f"{backbone.default_lora_layer_names()}, so nothing would be trained. Build "
        "the model again and name layers: backbone.enable_lora(rank, "
        f"target_layer_names=[...]) with some of {candidates}."
    )


def layers_of(backbone: keras_hub.models.Backbone) -> Iterator[keras.Layer]:
    """All layers within a backbone, at any depth, in a fixed order."""
    # Keras has no public way to all layers within layers; KerasHub's own
    # `enable_lora` goes the same way.
    return backbone._flatten_layers(include_self=False)
