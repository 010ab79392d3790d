"""`strided_attention` for CUDA: online softmax, no mask and no scores in memory.

A tile of rows holds whole blocks with all their samples and heads (see
`torch_triton_rows`), so that a document key is read once for all of them. Backward,
weights are computed anew; each key tile of the document knows the first and the
last block that see any of it. No atomics: the same numbers every time.
"""

from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from keras_ebft.kernels.strided_attention.torch_triton_backward import (
    document_gradient,
    own_gradient,
    query_gradient,
)
from keras_ebft.kernels.strided_attention.torch_triton_forward import attend
from keras_ebft.kernels.torch_triton_common import (
    capability_of,
    dot_settings,
    on_device_of,
)

# Programs that the gradient of document keys is split into at least.
MIN_PROGRAMS = 512


class Tiles(NamedTuple):
    """Sizes of the tiles of one program, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def settings(self):
        """As arguments of a kernel."""
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def choose_tiles(dtype, head_size, capability):
    """`Tiles` of the forward kernel, of the gradients of queries and of document keys,
    and of that of the blocks' own keys.

    Args:
        dtype: `torch.dtype` of the tensors.
        head_size: int, up to 256.
        capability: `(major, minor)`, or `None` in the interpreter.
    """
    if capability is None:
        return Tiles(64, 16, 4, 1), Tiles(64, 16, 4, 1), Tiles(64, 16, 4, 1)
    if dtype == torch.float32:
        backward = Tiles(*((32, 32) if head_size <= 64 else (16, 16)), 8, 1)
        return Tiles(32, 32, 8, 1), backward, backward
    if head_size <= 128 and capability[0] == 9:
        # The fastest of those that were tried on an H200 and do not spill.
        backward = Tiles(64, 32, 4, 3) if head_size <= 64 else Tiles(64, 32, 8, 2)
        return Tiles(64, 32, 4, 3), backward, Tiles(16, 16, 2, 2)
    if head_size <= 64:
        return Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)
    if head_size <= 128:
        forward = Tiles(64, 64, 8, 2) if capability < (9, 0) else Tiles(128, 32, 8, 2)
        return forward, Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)
    return Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)


def strided_attention_triton(
    query,
    key,
    value,
    document_key=None,
    document_value=None,
    anchors=None,
    *,
    scale,
    starts=None,
    query_offset=0,
    sliding_window=None,
    soft_cap=None,
):
    """See `keras_ebft.kernels.strided_attention`."""
    if document_key is not None:
        anchors = torch.as_tensor(anchors, dtype=torch.int32, device=query.device)
        anchors = anchors.reshape(-1, query.shape[2]).contiguous()
        if starts is not None:
            starts = starts.to(torch.int32).contiguous()
    options = {
        "scale": float(scale),
        "offset": int(query_offset),
        "window": int(sliding_window or 0),
        "cap": soft_cap,
    }
    return _StridedAttention.apply(
        query, key, value, document_key, document_value, anchors, starts, options
    )


class _StridedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, *document_and_options):
        *document, anchors, starts, options = document_and_options
        tensors = [query, key, value, *document]
        tensors = [None if t is None else t.contiguous() for t in tensors]
        call = _Attention(*tensors, anchors, starts, **options)
        with on_device_of(query):
            output, normaliser = call.forward()
        ctx.save_for_backward(*tensors, anchors, starts, output, normaliser)
        ctx.options = options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *tensors, output, normaliser = ctx.saved_tensors
        call = _Attention(*tensors, **ctx.options)
        upstream = upstream.contiguous()
        delta = (output.float() * upstream.float()).sum(dim=-1)
        with on_device_of(upstream):
            found = call.backward(upstream, normaliser, delta)
        return (*found, None, None, None)


class _Attention:
    """One call: contiguous tensors, sizes and settings of its kernels."""

    def __init__(
        self, query, key, value, document_key, document_value, anchors, starts, *,
        scale, offset, window, cap,
    ):  # fmt: skip
        self.own = (query, key, value)
        self.document = (document_key, document_value)
        self.places = (anchors, starts)
        self.batch, self.samples, self.blocks, self.queries, heads, size = query.shape
        self.num_keys, self.kv_heads = key.shape[3:5]
        self.length = 0 if document_key is None else document_key.shape[1]
        self.group = heads // self.kv_heads
        one_for_all = anchors is None or anchors.shape[0] == 1
        self.anchor_stride = 0 if one_for_all else self.blocks
        self.offset = offset
        self.window = window
        self.scales = (scale, float(cap or 0.0))
        self.tiles = choose_tiles(query.dtype, size, capability_of(query))
        self.constants = {
            "WINDOW": window,
            "HAS_CAP": cap is not None,
            "GROUP": self.group,
            "SIZE": size,
            "PADDED": max(16, triton.next_power_of_2(size)),
            **dot_settings(),
        }
        self.has = {
            "HAS_DOCUMENT": document_key is not None,
            "HAS_STARTS": starts is not None,
        }

    @property
    def sizes(self):
        """What the kernels over rows take."""
        return (
            self.samples, self.blocks, self.queries, self.num_keys, self.length,
            self.kv_heads, self.anchor_stride, self.offset, *self.scales,
        )  # fmt: skip

    def row_grid(self, tiles):
        """Programs of a kernel over rows."""
        rows = self.blocks * self.samples * self.group * self.queries
        return triton.cdiv(rows, tiles.rows), self.batch * self.kv_heads

    def forward(self):
        """`(output, log-normaliser)`, `[B, n, K, Q, H, d]` and `[B, n, K, Q, H]`."""
        query, tiles = self.own[0], self.tiles[0]
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        normaliser = torch.empty(
            query.shape[:-1], dtype=torch.float32, device=query.device
        )
        attend[self.row_grid(tiles)](
            *self.own, *self.document, *self.places, output, normaliser, *self.sizes,
            **self.has, **self.constants, **tiles.settings,
        )  # fmt: skip
        return output, normaliser

    def backward(self, *upstream):
        """Gradients of all five tensors, `None` for a document that is not there.

        Args:
            *upstream: gradient of the output, log-normaliser and delta.
        """
        query_found = self._empty_like(self.own[0])
        query_gradient[self.row_grid(self.tiles[1])](
            *self.own, *self.document, *self.places, *upstream, query_found,
            *self.sizes, **self.has, **self.constants, **self.tiles[1].settings,
        )  # fmt: skip
        own = self._own_gradients(upstream)
        if self.document[0] is None:
            return query_found, *own, None, None
        return query_found, *own, *self._document_gradients(upstream)

    def _own_gradients(self, upstream):
        tiles = self.tiles[2]
        found = [self._empty_like(tensor) for tensor in self.own[1:]]
        columns = self.blocks * self.samples * self.num_keys
        own_gradient[triton.cdiv(columns, tiles.keys), self.batch * self.kv_heads](
            *self.own, *self.places, *upstream, *found, self.samples, self.blocks,
            self.queries, self.num_keys, self.kv_heads, self.offset, *self.scales,
            **self.constants, **tiles.settings,
        )  # fmt: skip
        return found

    def _document_gradients(self, upstream):
        tiles = self.tiles[1]
        key_tiles = triton.cdiv(self.length, tiles.keys)
        programs = key_tiles * self.batch * self.kv_heads
        splits = max(1, min(triton.cdiv(MIN_PROGRAMS, programs), self.blocks))
        shape = (splits, *self.document[0].shape)
        found = [
            torch.empty(shape, dtype=torch.float32, device=self.own[0].device)
            for _ in range(2)
        ]
        document_gradient[key_tiles, splits, self.batch * self.kv_heads](
            self.own[0], *self.document, *self.places, *upstream,
            *self._seeing_blocks(tiles.keys, key_tiles), *found, self.batch,
            self.samples, self.blocks, self.queries, self.length, self.kv_heads,
            self.anchor_stride, self.offset, splits, *self.scales,
            HAS_STARTS=self.has["HAS_STARTS"], **self.constants, **tiles.settings,
        )  # fmt: skip
        return [part.sum(dim=0).to(self.own[0].dtype) for part in found]

    def _seeing_blocks(self, size, count):
        """First and last block that see any key of each tile, int32 `[B, tiles]`."""
        anchors, starts = self.places
        anchors = anchors.expand(self.batch, -1)[:, None]
        first = torch.zeros_like(anchors) if starts is None else starts[:, None]
        if self.window:
            first = first.maximum(anchors + self.offset - self.window + 1)
        tile = torch.arange(count, dtype=torch.int32, device=anchors.device)[:, None]
        seen = (anchors > tile * size) & (first < (tile + 1) * size)
        block = torch.arange(self.blocks, dtype=torch.int32, device=anchors.device)
        lowest = torch.where(seen, block, self.blocks).amin(dim=-1)
        highest = torch.where(seen, block, -1).amax(dim=-1)
        return lowest.contiguous(), highest.contiguous()

    @staticmethod
    def _empty_like(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
