"""`strided_attention` in tiles of blocks, by PyTorch's fused attention on CPU."""

import functools
import weakref
from collections import OrderedDict

import torch

from keras_ebft.kernels.strided_attention.blockwise import (
    strided_attention_blockwise,
    tile_ranges,
)
from keras_ebft.kernels.torch_fused_attention import Spans, fused_tile_attention

# Of layers with and without a window, in the passes over one batch.
MOST_KNOWN = 4


class KnownSpans:
    """`Spans` by what they follow from: made once for all layers and tokens.

    Tensors are known by being the very same, which nobody has written to.
    """

    def __init__(self):
        self._found = OrderedDict()

    def __call__(self, layout, anchors, starts, sliding_window, query_offset):
        """The `Spans` of what `tile_ranges` makes of the same arguments."""
        # Without a window a query sees the same keys wherever in its block it is.
        offset = None if sliding_window is None else int(query_offset)
        key = (
            *(layout.shape, layout.heads, layout.cut, sliding_window, offset),
            *map(_identity, (anchors, starts)),
        )
        if key not in self._found:
            arguments = layout, anchors, starts, sliding_window, query_offset
            spans = Spans(tile_ranges(*arguments))
            # What PyTorch traces with has no values; nobody else may be given it.
            if type(spans.low) is not torch.Tensor:
                return spans
            self._found[key] = spans, self._until_gone(key, anchors, starts)
        self._found.move_to_end(key)
        while len(self._found) > MOST_KNOWN:
            self._found.popitem(last=False)
        return self._found[key][0]

    def _until_gone(self, key, *places):
        """References that end with a tensor: its address may be another's then."""

        def forget(reference):
            self._found.pop(key, None)

        return [weakref.ref(p, forget) for p in places if torch.is_tensor(p)]


def _identity(places):
    if torch.is_tensor(places):
        # In inference mode nobody counts how often a tensor was written to.
        return id(places), object() if places.is_inference() else places._version
    return None if places is None else places.tobytes()


strided_attention_fused = functools.partial(
    strided_attention_blockwise, attend=fused_tile_attention, make_ranges=KnownSpans()
)
