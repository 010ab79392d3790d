"""Networks whose attention the caller supplies, and networks of whole rows."""

import contextlib

import keras
from keras import ops

from keras_ebft.networks import adapters
from keras_ebft.networks.families import decoder_layers
from keras_ebft.networks.layer_route import layer_route
from keras_ebft.networks.lending import kernels_unpacked_late, tokens_on_one_axis
from keras_ebft.networks.rematerialisation import rematerialised, without_remat_scope
from keras_ebft.networks.serving_route import serving_route


class RoutedNetwork:
    """A backbone, or the lower part of one, whose attention the caller supplies.

    Args:
        model: `keras.Model` that maps a backbone's inputs to hidden states.
        num_layers: int, decoder layers in `model`.
        backbone: the backbone whose layers these are.
        family: `Family` of the backbone.
        switched_off: layers whose adapters take no part.
        rematerialize: bool, whether decoder layers run again in the backward pass
            instead of keeping what they computed.
    """

    def __init__(
        self,
        model,
        num_layers,
        backbone,
        family,
        switched_off=(),
        rematerialize=False,
    ):
        self.model = model
        self.num_layers = num_layers
        self.backbone = backbone
        self.family = family
        self.switched_off = switched_off
        self.rematerialize = rematerialize

    def __call__(self, token_ids, positions, attend, caches=None):
        """Runs the network on independent tokens; `attend` connects them.

        Args:
            token_ids: int32 tensor of any static shape.
            positions: int32 tensor of the same shape, position ids.
            attend: function `(query, key, value, cache, *, scale,
                sliding_window, soft_cap) -> (output, cache)`, called once per
                layer with `[*shape, heads, head_dim]` tensors.
            caches: list with one entry per layer, handed to `attend`.

        Returns:
            `(outputs, caches)`: the model's outputs with the leading axes of
            `token_ids`, and the caches `attend` returned.

        Raises:
            ValueError: if attention did not pass through `attend` once per layer.
        """
        shape = tuple(token_ids.shape)
        caches = [None] * self.num_layers if caches is None else caches
        token_ids = ops.reshape(token_ids, (-1, 1))
        positions = ops.reshape(positions, (-1, 1))
        decoders = decoder_layers(self.backbone)[: self.num_layers]
        updated = []

        def route(layers, caches, updated):
            attention = self._attention(attend, shape, caches, updated)
            return self._route(attention, layers, positions)

        with contextlib.ExitStack() as stack:
            stack.enter_context(adapters.switched_off(self.switched_off))
            stack.enter_context(without_remat_scope(self.backbone))
            # Embeddings ask it for positions, also where each layer opens its own.
            together = [] if self.rematerialize else decoders
            stack.enter_context(route(together, caches, updated))
            if self.rematerialize:
                within = rematerialised(
                    decoders,
                    caches,
                    updated,
                    lambda layer, cache, found: route([layer], [cache], found),
                )
                stack.enter_context(within)
            # What is trained and embedded is what was sampled from: no dropout,
            # which TensorFlow would take from the surrounding train step.
            outputs = self.model(
                {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)},
                training=False,
            )
        if len(updated) != self.num_layers:
            raise self._wrong_number_of_calls(len(updated))
        outputs = keras.tree.map_structure(
            lambda output: ops.reshape(output, (*shape, output.shape[-1])), outputs
        )
        return outputs, updated

    def _attention(self, attend, shape, caches, updated):
        """`attend` for tokens in one row, called for one layer after another."""

        def attention(query, key, value, scale, sliding_window=None, soft_cap=None):
            if len(updated) == len(caches):
                raise self._wrong_number_of_calls(f"more than {len(caches)}")
            output, cache = attend(
                *(
                    ops.reshape(tensor, (*shape, *tensor.shape[-2:]))
                    for tensor in (query, key, value)
                ),
                caches[len(updated)],
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
            )
            updated.append(cache)
            return ops.reshape(output, query.shape)

        return attention

    @contextlib.contextmanager
    def _route(self, attention, layers, positions):
        if self.family.route == "serving":
            route = serving_route(attention, self.backbone, positions)
        else:
            name = self.family.attention
            route = layer_route(attention, self.backbone, name, layers, positions)
        with route, tokens_on_one_axis(layers), kernels_unpacked_late(layers):
            yield

    def _wrong_number_of_calls(self, received):
        return ValueError(
            f"Expected attention to be routed once in each of {self.num_layers} "
            f"layers of {type(self.backbone).__name__}. Received: {received} routed "
            "calls. Use a family this library supports, unchanged."
        )


class RowNetwork:
    """A backbone, or the lower part of one, that only runs whole rows.

    Args:
        model: `keras.Model` that maps a backbone's inputs to hidden states.
        num_layers: int, decoder layers in `model`.
        backbone: the backbone whose layers these are.
        switched_off: layers whose adapters take no part.
        rematerialize: bool, whether decoder layers run again in the backward pass.
    """

    def __init__(
        self, model, num_layers, backbone, switched_off=(), rematerialize=False
    ):
        self.model = model
        self.num_layers = num_layers
        self.backbone = backbone
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(adapters.switched_off(self.switched_off))
            stack.enter_context(without_remat_scope(self.backbone))
            if self.rematerialize:
                stack.enter_context(self._rematerialised())
            outputs = self.model(inputs, training=False)
        return keras.tree.map_structure(
            lambda output: ops.reshape(output, (*lead, length, output.shape[-1])),
            outputs,
        )

    def _rematerialised(self):
        decoders = decoder_layers(self.backbone)[: self.num_layers]

        def nothing(layer, cache, updated):
            return contextlib.nullcontext()

        return rematerialised(decoders, [None] * self.num_layers, [], nothing)
