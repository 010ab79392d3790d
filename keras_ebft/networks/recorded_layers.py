"""Decoder layers that are alike, recorded around their attention and played again.

But for attention, what a layer does follows from shapes alone. Attention is called
anew: which keys tokens see, and which kernel looks at them, may differ each time.
"""

import logging
from collections import OrderedDict
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_ebft.backend.recording import (
    NotRecordableError,
    Recording,
    record,
    runs_op_by_op,
)
from keras_ebft.kernels.dispatch import requested_implementations
from keras_ebft.networks.repeated_layers import weights_of

logger = logging.getLogger(__name__)

# Calls of one shape before it is recorded, which takes as long as a hundred of them.
PLAIN_CALLS = 48
# Shapes that are known at a time.
MOST_KNOWN = 64
# How far apart a layer and its recording may be, as a share of the largest number.
TOLERANCE = 1e-2
# What arrives when: what layers share, what each has, and the output of attention.
SHARED, OWN, ATTENDED = range(3)


def worth_recording(family, x, given):
    """Whether decoder layers are recorded and played.

    Args:
        family: `Family`.
        x: what runs from layer to layer.
        given: list with what each layer is given besides.
    """
    return (
        runs_op_by_op()
        and family.repeated
        and ops.is_tensor(x)
        and all(own is given[0] for own in given)
        and all(leaf is None or ops.is_tensor(leaf) for leaf in _leaves(given[0]))
    )


class Recordings:
    """What is known of the layers of one network, by the shapes they were given."""

    def __init__(self):
        # Calls so far, then a `RecordedLayer`, or `None` for what cannot be one.
        self._known = OrderedDict()

    def run(self, layers, x, given, caches):
        """Runs like layers one after another.

        Args:
            layers: list of the layers of a `RoutedNetwork`, of one pass.
            x: tensor that runs from layer to layer.
            given: structure of tensors and `None` that every layer is given.
            caches: list with one structure of tensors, or `None`, per layer.

        Returns:
            `(x, caches)`, as if none had been recorded.
        """
        shared, begun, updated = _shared(layers[0], given), {}, []
        for layer, cache in zip(layers, caches):
            own = [x, *weights_of(layer.decoder)]
            key = _key(layer, [*shared, *own])
            recorded = self._recorded(key, layer, x, given, cache)
            if recorded is None:
                x, new = layer(x, given, cache)
            else:
                if key not in begun:
                    begun[key] = recorded.begin(shared)
                x, new = recorded.play(begun[key], own, layer.attend, cache)
            updated.append(new)
        return x, updated

    def _recorded(self, key, layer, x, given, cache):
        """The `RecordedLayer` of a shape, or `None` where the layer itself runs."""
        known = self._known.setdefault(key, 0)
        self._known.move_to_end(key)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        if not isinstance(known, int):
            return known
        if known < PLAIN_CALLS:
            self._known[key] += 1
            return None
        self._known[key] = record_layer(layer, x, given, cache)
        return self._known[key]


class RecordedLayer(NamedTuple):
    """The operations of a layer, and the options with which it calls attention."""

    recording: Recording
    options: dict[str, Any]

    def begin(self, shared):
        """What layers of a pass share, to be given to `play`."""
        return self.recording.play(SHARED, shared, {})[1]

    def play(self, begun, own, attend, cache):
        """What the layer returns.

        Args:
            begun: what `begin` returned.
            own: list of tensors, the layer's input and weights.
            attend: see `RoutedNetwork`.
            cache: structure of tensors or `None`.

        Returns:
            `(x, cache)`.
        """
        projected, left = self.recording.play(OWN, own, begun)
        output, cache = attend(*projected, cache, **self.options)
        (x,), _ = self.recording.play(ATTENDED, [output], {**begun, **left})
        return x, cache


def record_layer(layer, x, given, cache):
    """Records a layer.

    Args:
        layer: a layer of a `RoutedNetwork`.
        x: what it is called with, as is all that follows.
        given: structure of tensors and `None`.
        cache: structure of tensors or `None`.

    Returns:
        `RecordedLayer`; `None`, with a line in the log, for a layer that cannot be
        recorded or whose recording returns something else.
    """
    attended = []

    def attend(*arguments, **options):
        output, new = layer.attend(*arguments, **options)
        attended.append((output, options))
        return output, new

    expected, _ = layer.replaced(attend=attend)(x, given, cache)
    ((output, options),) = attended
    shared, own = _shared(layer, given), [x, *weights_of(layer.decoder)]
    try:
        recording = record(_around_attention(layer, given), [shared, own, [output]])
    except NotRecordableError as error:
        _log_unrecorded(layer, error)
        return None
    recorded = RecordedLayer(recording, options)
    if recording.result_stages != [OWN, OWN, OWN, ATTENDED]:
        _log_unrecorded(layer, "attention is called with something else")
        return None
    found, _ = recorded.play(
        recorded.begin(shared), own, lambda *_, **__: (output, None), None
    )
    if not _is_close(found, expected):
        _log_unrecorded(layer, "what was recorded returns something else")
        return None
    return recorded


def _around_attention(layer, given):
    """A layer as a function of tensors to query, key, value and what it returns."""
    variables, count = layer.decoder.variables, len(_leaves(given))

    def run(positions, *tensors):
        leaves, (x, *weights, output) = tensors[:count], tensors[count:]
        projected = []

        def attend(query, key, value, cache, **options):
            projected.extend((query, key, value))
            return output, None

        alone = layer.replaced(attend=attend, positions=positions, tables=None)
        mapping = list(zip(variables, weights))
        with keras.StatelessScope(state_mapping=mapping, initialize_variables=False):
            x, _ = alone(x, keras.tree.pack_sequence_as(given, leaves), None)
        return [*projected, x]

    return run


def _shared(layer, given):
    return [layer.positions, *_leaves(given)]


def _leaves(given):
    return keras.tree.flatten(given)


def _key(layer, leaves):
    """All that the operations of a layer follow from."""
    return (
        layer.shape,
        layer.decoder.compute_dtype,
        requested_implementations(),
        *(None if t is None else (t.shape, t.dtype, t.device) for t in leaves),
    )


def _is_close(found, expected):
    found, expected = (ops.cast(tensor, "float32") for tensor in (found, expected))
    apart = ops.max(ops.abs(found - expected))
    return bool(apart <= TOLERANCE * ops.max(ops.abs(expected)))


def _log_unrecorded(layer, reason):
    name = type(layer.decoder).__name__
    logger.info("Layers of %s run unrecorded, some slower: %s.", name, reason)
