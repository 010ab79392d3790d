"""Models that several devices of JAX hold in parts, and the memory that this takes.

See docs/distribution.md for what a user writes on each engine.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import keras
import keras_hub

from keras_ebft.backend.runtime import without_values
from keras_ebft.networks import num_layers
from keras_ebft.validation import check_int, check_number

# A backbone, or a function that makes one: then nothing of it is allocated.
BackboneOrMaker: TypeAlias = (
    keras_hub.models.Backbone | Callable[[], keras_hub.models.Backbone]
)
Axes: TypeAlias = tuple[str | None, ...]

# What comes out of these, `[rows, tokens, width]`, is kept apart by rows.
OUTPUTS = (
    r"(.*/)?(token_embedding|(transformer_layer|decoder_block|rwkv_layer)_\d+)/output"
)
ADAPTED = ("kernel", "embeddings")


class Parameter(NamedTuple):
    """A variable that need not exist."""

    path: str
    shape: tuple[int, ...]
    bytes_per_value: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def layout_map(
    backbone: BackboneOrMaker,
    device_mesh: keras.distribution.DeviceMesh,
    model_axis: str = "model",
    batch_axis: str = "batch",
    shard_outputs: bool = False,
) -> keras.distribution.LayoutMap:
    """Where the weights of a backbone are, for `keras.distribution.ModelParallel`.

    KerasHub's own map where the family has one, for what it names. All other weights
    of two axes or more, output embeddings and adapters among them, are cut along their
    longest axis that the model axis of the mesh divides, and the next longest that the
    batch axis divides. Optimizer slots follow their weights, and so do the frozen
    copies that an `EBFTModel` makes.

    Args:
        backbone: `keras_hub.models.Backbone`, or a function without arguments that
            makes one; it is called so that no weight is allocated.
        device_mesh: `keras.distribution.DeviceMesh`.
        model_axis: str, axis of the mesh that weights are cut along first.
        batch_axis: str, axis of the mesh that rows of a batch are cut along, and
            weights beside.
        shard_outputs: bool, whether the outputs of embedding and decoder layers are
            held to be cut by rows. Every call of the model, `generate` included, then
            needs a number of rows that the batch axis divides.

    Returns:
        `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if the mesh has no such axis.

    Example:
    ```python
    def backbone():
        return keras_hub.models.Backbone.from_preset("gemma3_1b", load_weights=False)

    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layout = keras_ebft.distribution.layout_map(backbone, mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    )
    ```
    """
    made = _without_memory(backbone)
    found = keras.distribution.LayoutMap(device_mesh)
    for path, axes in _layouts(made, device_mesh, model_axis, batch_axis).items():
        if any(axes):
            found[path] = axes
            for adapter, own in _adapters(path, axes).items():
                found[adapter] = own
    if shard_outputs:
        found[OUTPUTS] = (batch_axis, None, None)
    return found


class Plan(NamedTuple):
    """Bytes that every device holds of a model in training, all through.

    Attributes:
        weights: int, the policy's.
        gradients: int.
        optimizer: int, its slots.
        frozen: int, the frozen copy that features come from.
        adapters: int, weights, gradients and slots of them.
        devices: int.
        whole: int, bytes on one device alone.
    """

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    adapters: int
    devices: int
    whole: int

    @property
    def total(self) -> int:
        """Bytes on every device."""
        own = (self.weights, self.gradients, self.optimizer, self.frozen)
        return sum(own) + self.adapters

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "frozen", "adapters", "total")
        rows = [f"{name:<10} {getattr(self, name) / 2**30:9.2f} GiB" for name in names]
        title = f"each of {self.devices} devices (one alone: {self.whole / 2**30:.2f})"
        return "\n".join([title, *rows])


def plan(
    backbone: BackboneOrMaker,
    mesh: Mapping[str, int] | None = None,
    *,
    slots: int = 2,
    lora_rank: int = 0,
    frozen_depth: float = 0.75,
    sharded: bool = True,
) -> Plan:
    """Memory of a training on every device of a mesh, without allocating any of it.

    With P the bytes of a weight, c the number of parts that it is cut into, L the
    decoder layers and f the share of them that features need:

        weights    sum P / c                 gradients  sum P / c
        optimizer  slots * sum P / c         frozen     sum over the first f L layers
                                                        and the embedding, P / c

    With adapters of rank r, gradients and slots are the adapters' alone, of
    `r * (first axes + last axis)` values per weight, and the base serves as the frozen
    copy. Activations, which follow from batch and length, are not counted.

    Args:
        backbone: as of `layout_map`.
        mesh: dict from the names `"batch"` and `"model"` to numbers of devices;
            `None` for one device.
        slots: int, values that the optimizer keeps of each weight: 2 of Adam and its
            kin, 1 of SGD with momentum, 0 of SGD.
        lora_rank: int, rank of adapters; 0 for full fine-tuning.
        frozen_depth: float in (0, 1], depth of the last layer that features come from.
        sharded: bool, whether weights are cut as `layout_map` says; else every device
            holds all of them (JAX' `DataParallel`, PyTorch's processes).

    Returns:
        `Plan`; printed, a table.

    Raises:
        ValueError: for values out of range, or a mesh of other axes.

    Example:
    ```python
    print(keras_ebft.distribution.plan(backbone, {"batch": 2, "model": 4}))
    ```
    """
    sizes = _check_mesh(mesh)
    check_int("slots", slots, 0)
    check_int("lora_rank", lora_rank, 0)
    check_number("frozen_depth", frozen_depth, 0.0, 1.0, exclusive=True)
    made = _without_memory(backbone)
    kept = math.ceil(frozen_depth * num_layers(made))
    held = _held(made, sizes, sharded, kept, lora_rank)
    alone = _held(made, {"batch": 1, "model": 1}, False, kept, lora_rank)
    return _plan(held, alone, math.prod(sizes.values()), slots, bool(lora_rank))


def _plan(
    held: dict[str, int], alone: dict[str, int], devices: int, slots: int, lora: bool
) -> Plan:
    def parts(bytes_of: dict[str, int]) -> dict[str, int]:
        trained = 0 if lora else bytes_of["weights"]
        return {
            "weights": bytes_of["weights"],
            "gradients": trained,
            "optimizer": slots * trained,
            "frozen": 0 if lora else bytes_of["frozen"],
            "adapters": (2 + slots) * bytes_of["adapters"],
        }

    return Plan(**parts(held), devices=devices, whole=sum(parts(alone).values()))


def _held(
    backbone: keras_hub.models.Backbone,
    sizes: dict[str, int],
    sharded: bool,
    kept: int,
    lora_rank: int,
) -> dict[str, int]:
    """Bytes on a device of the weights, of a copy of lower layers, of adapters."""
    mesh = keras.distribution.DeviceMesh(
        (sizes["batch"], sizes["model"]),
        ("batch", "model"),
        [f"none:{index}" for index in range(math.prod(sizes.values()))],
    )
    layouts = _layouts(backbone, mesh, "model", "batch") if sharded else {}
    held = {"weights": 0, "frozen": 0, "adapters": 0}
    for parameter in _parameters(backbone):
        axes = layouts.get(parameter.path, ())
        own = parameter.size * parameter.bytes_per_value // _parts(axes, sizes)
        held["weights"] += own
        if _belongs_to_copy(parameter.path, kept):
            held["frozen"] += own
        if lora_rank:
            held["adapters"] += _adapter_bytes(parameter, axes, sizes, lora_rank)
    return held


def _belongs_to_copy(path: str, kept: int) -> bool:
    layer = re.search(r"(?:layer|block)_(\d+)(?:/|$)", path)
    if layer is None:
        return "reverse_embeddings" not in path and not path.startswith("head/")
    return int(layer.group(1)) < kept


def _adapter_bytes(
    parameter: Parameter, axes: Axes, sizes: dict[str, int], rank: int
) -> int:
    # What `Backbone.enable_lora` adapts.
    if not re.search(r"(query|value)[^/]*/kernel$", parameter.path):
        return 0
    *first, last = parameter.shape
    padded = axes or (None,) * len(parameter.shape)
    return (
        rank * math.prod(first) // _parts(padded[:-1], sizes)
        + rank * last // _parts(padded[-1:], sizes)
    ) * parameter.bytes_per_value


def _without_memory(backbone: BackboneOrMaker) -> keras_hub.models.Backbone:
    if isinstance(backbone, keras_hub.models.Backbone):
        return backbone
    if not callable(backbone):
        raise TypeError(
            "Expected a keras_hub.models.Backbone, or a function that makes one. "
            f"Received: {backbone!r} (of type {type(backbone).__name__})."
        )
    made = without_values(backbone)
    if not isinstance(made, keras_hub.models.Backbone):
        raise TypeError(
            "Expected a function that returns a keras_hub.models.Backbone. Received: "
            f"one that returned {made!r} (of type {type(made).__name__})."
        )
    return made


def _parameters(backbone: keras_hub.models.Backbone) -> list[Parameter]:
    return [
        Parameter(variable.path, tuple(variable.shape), _bytes(variable.dtype))
        for variable in backbone.weights
    ]


def _bytes(dtype: str) -> int:
    """Bytes of one value: NumPy does not know "bfloat16" and its like."""
    digits = re.search(r"\d+", dtype)
    return max(int(digits.group()) // 8, 1) if digits else 1


def _layouts(
    backbone: keras_hub.models.Backbone,
    device_mesh: keras.distribution.DeviceMesh,
    model_axis: str,
    batch_axis: str,
) -> dict[str, Axes]:
    """The axes of the mesh that each weight is cut along, by its path."""
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape))
    if {model_axis, batch_axis} - set(sizes):
        raise ValueError(
            f"Expected a mesh with the axes {batch_axis!r} and {model_axis!r}. "
            f"Received: {list(sizes)}. Name its axes so, or pass their names."
        )
    own: Any = getattr(type(backbone), "get_layout_map", None)
    named = own(device_mesh, model_axis, batch_axis) if own else {}
    found = {}
    for parameter in _parameters(backbone):
        layout = named[parameter.path] if own else None
        axes = None if layout is None else tuple(layout.axes)
        if axes is None or not _divides(axes, parameter.shape, sizes):
            axes = _by_length(parameter.shape, sizes, (model_axis, batch_axis))
        found[parameter.path] = axes
    return found


def _by_length(
    shape: tuple[int, ...], sizes: dict[str, int], names: tuple[str, str]
) -> Axes:
    axes: list[str | None] = [None] * len(shape)
    if len(shape) < 2:
        return tuple(axes)
    for name in names:
        fits = [
            (length, place)
            for place, length in enumerate(shape)
            if axes[place] is None and not length % sizes[name]
        ]
        if fits and sizes[name] > 1:
            axes[max(fits)[1]] = name
    return tuple(axes)


def _divides(axes: Axes, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    return len(axes) == len(shape) and not any(
        length % sizes[name] for name, length in zip(axes, shape) if name is not None
    )


def _adapters(path: str, axes: Axes) -> dict[str, Axes]:
    """Layouts of the low-rank factors that Keras makes of a weight."""
    scope, _, name = path.rpartition("/")
    if name not in ADAPTED:
        return {}
    return {
        f"{scope}/lora_{name}_a": (*axes[:-1], None),
        f"{scope}/lora_{name}_b": (None, axes[-1]),
    }


def _parts(axes: Axes, sizes: dict[str, int]) -> int:
    return math.prod(sizes[name] for name in axes if name is not None)


def _check_mesh(mesh: Mapping[str, int] | None) -> dict[str, int]:
    sizes = {"batch": 1, "model": 1, **(mesh or {})}
    if set(sizes) != {"batch", "model"}:
        raise ValueError(
            "Expected a mesh of the axes 'batch' and 'model'. Received: "
            f"{sorted(mesh or {})}."
        )
    return {name: check_int(f"mesh[{name!r}]", size, 1) for name, size in sizes.items()}
