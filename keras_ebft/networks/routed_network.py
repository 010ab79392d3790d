"""Networks whose attention the caller supplies: a backbone, layer by layer.

Tokens come as independent rows of one token each. Embeddings run first, then one
decoder layer after another, each with an attention of the caller's within it, which
is all that connects tokens; the last layer's hidden states are normalised.
"""

from keras import ops

from keras_ebft.networks import adapters
from keras_ebft.networks.families import family_of
from keras_ebft.networks.layer_patches import token_by_token, without_remat_scope
from keras_ebft.networks.layer_powers import powers_by_numbers
from keras_ebft.networks.patches import patched
from keras_ebft.networks.recorded_layers import Recordings, worth_recording
from keras_ebft.networks.rematerialisation import run_again
from keras_ebft.networks.repeated_layers import run_repeated, worth_looping
from keras_ebft.networks.rotary_tables import RotaryTables


class RoutedNetwork:
    """A backbone, or the lower part of one, whose attention the caller supplies.

    Args:
        model: `keras.Model` of the same layers, which owns their variables.
        backbone: the backbone whose layers these are.
        layers: increasing list of ints, the tapped layers; layer 1 is the first
            decoder layer. `None`: the whole backbone.
        depth: int, the layer that is tapped after the final normalisation.
        switched_off: layers whose adapters take no part.
        rematerialize: bool, whether decoder layers run again in the backward pass
            instead of keeping what they computed.
    """

    def __init__(
        self, model, backbone, layers, depth, switched_off=(), rematerialize=False
    ):
        self.model = model
        self.backbone = backbone
        self.layers = layers
        self.depth = depth
        self.switched_off = switched_off
        self.rematerialize = rematerialize
        self.num_layers = depth if layers is None else layers[-1]
        self.family = family_of(backbone)
        self._embed = self.family.embedding(backbone, self.num_layers)
        self._recordings = Recordings()

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
            `(outputs, caches)`: final hidden states `[*shape, D]`, or a list of those
            of every tapped layer, and the caches `attend` returned.

        Raises:
            ValueError: if a layer did not call `attend` exactly once.
        """
        shape = tuple(token_ids.shape)
        token_ids = ops.reshape(token_ids, (-1, 1))
        positions = ops.reshape(positions, (-1, 1))
        decoders = self.family.decoder_layers(self.backbone)[: self.num_layers]
        caches = [None] * len(decoders) if caches is None else caches
        taps = [self.depth] if self.layers is None else self.layers
        outputs, updated, tables = [], [], RotaryTables()
        with (
            adapters.switched_off(self.switched_off),
            patched(without_remat_scope(self.backbone)),
        ):
            x, given = self._embed(token_ids, positions)
            first = 0
            for last in sorted({*taps, len(decoders)}):
                run = slice(first, last)
                layers = [
                    _Layer(self, decoder, index, attend, shape, positions, tables)
                    for index, decoder in enumerate(decoders[run], start=first + 1)
                ]
                x, new = self._run(layers, x, given[run], caches[run])
                updated += new
                if last in taps:
                    outputs.append(self._tap(x, last, shape))
                first = last
        return (outputs[0] if self.layers is None else outputs), updated

    def _run(self, layers, x, given, caches):
        """One decoder layer after another, all as one in a loop, or recorded."""
        decoders = [layer.decoder for layer in layers]
        looping = worth_looping(self.family, decoders, given, self.num_layers)
        if looping or self.rematerialize:
            layers = [layer.replaced(tables=None) for layer in layers]
        if looping:
            return run_repeated(
                layers[0], decoders, x, given[0], caches, self.rematerialize
            )
        if worth_recording(self.family, x, given):
            return self._recordings.run(layers, x, given[0], caches)
        updated = []
        for layer, own, cache in zip(layers, given, caches):
            run = run_again(layer) if self.rematerialize else layer
            x, new = run(x, own, cache)
            updated.append(new)
        return x, updated

    def _tap(self, x, index, shape):
        """The hidden state after a layer, `[*shape, D]`."""
        hidden = self.family.hidden(self.backbone, x)
        if index == self.depth:
            final_norm = self.family.final_norm(self.backbone)
            with patched(powers_by_numbers(final_norm)):
                hidden = final_norm(hidden)
        return ops.reshape(hidden, (*shape, hidden.shape[-1]))


class _Layer:
    """One decoder layer with the caller's attention: `(x, given, cache) -> (x, cache)`.

    Args:
        network: `RoutedNetwork`.
        decoder: decoder layer.
        index: int from 1.
        attend, shape, positions: see `RoutedNetwork.__call__`.
        tables: `RotaryTables`, or `None` for some of each call's own.
    """

    def __init__(self, network, decoder, index, attend, shape, positions, tables):
        self.network = network
        self.decoder = decoder
        self.index = index
        self.attend = attend
        self.shape = shape
        self.positions = positions
        self.tables = tables

    def replaced(self, **changes):
        """The same layer with other arguments; without tables for a program alone."""
        names = (
            "network",
            "decoder",
            "index",
            "attend",
            "shape",
            "positions",
            "tables",
        )
        return _Layer(**{**{name: getattr(self, name) for name in names}, **changes})

    def __call__(self, x, given, cache):
        family, updated = self.network.family, []
        tables = RotaryTables() if self.tables is None else self.tables

        def attend(query, key, value, scale, sliding_window=None, soft_cap=None):
            output, new = self.attend(
                *(
                    ops.reshape(tensor, (*self.shape, *tensor.shape[-2:]))
                    for tensor in (query, key, value)
                ),
                cache,
                scale=scale,
                sliding_window=family.window(self.decoder, sliding_window),
                soft_cap=soft_cap,
            )
            updated.append(new)
            return ops.reshape(output, query.shape)

        # What is trained and embedded is what was sampled from: families call their
        # layers without dropout, which TensorFlow would take from the train step.
        with (
            family.attention(self.decoder, attend, self.positions),
            patched(token_by_token(self.decoder)),
            patched(tables.patches(self.decoder)),
        ):
            x = family.layer(self.decoder, x, given)
        self._check_called_once(len(updated))
        return x, updated[0]

    def _check_called_once(self, calls):
        if calls != 1:
            raise ValueError(
                "Expected attention to be routed once in each of "
                f"{self.network.num_layers} layers of "
                f"{type(self.network.backbone).__name__}. Received: {calls} routed "
                f"calls in layer {self.index}. Use a family this library supports, "
                "unchanged."
            )
