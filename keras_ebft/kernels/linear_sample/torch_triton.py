"""`linear_sample` for CUDA: inverting the cumulative distribution in two passes.

The first pass keeps three numbers for every group of `GROUP` tokens, which tell the
group that a uniform number falls into; the second computes that group's logits
again and finds the token. Groups are those of the definition: the same number gives
the same token, whatever the tiles.
"""

from typing import NamedTuple

import torch
import triton

from keras_ebft.kernels.linear_sample.reference import GROUP
from keras_ebft.kernels.linear_sample.torch_triton_kernels import (
    draw_in_group,
    reduce_groups,
)
from keras_ebft.kernels.torch_triton_common import (
    capability_of,
    dot_settings,
    on_device_of,
)

BELOW_ONE = 1.0 - 1e-6


class Tiles(NamedTuple):
    """Rows per program of each pass, depth of the products, and compiler options."""

    rows: int
    depth: int
    draw_rows: int
    draw_depth: int
    num_warps: int
    num_stages: int


def choose_tiles(dtype, capability):
    """`Tiles` for operands of a dtype on a CUDA device.

    Args:
        dtype: `torch.dtype` of `hidden` and `head`.
        capability: `(major, minor)`, or `None` in the interpreter.
    """
    if capability is None:
        return Tiles(512, 32, 256, 8, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 32, 1, 32, 4, 3)
    return Tiles(128, 64 if capability >= (9, 0) else 32, 1, 64, 8, 3)


def linear_sample_triton(
    hidden, head, uniform, *, temperature=1.0, top_k=None, top_p=1.0, soft_cap=None
):
    """See `keras_ebft.kernels.linear_sample`; without `top_k` and `top_p`."""
    with torch.no_grad(), on_device_of(hidden):
        hidden = hidden.contiguous()
        greedy = temperature == 0.0
        product = _Product(hidden, head, temperature or 1.0, soft_cap)
        largest, total, token = product.reduce()
        highest = largest.amax(dim=1)
        totals = total * (largest - highest[:, None]).exp()
        group_end = totals.cumsum(dim=1)
        normaliser = group_end[:, -1].log()
        if greedy:
            # `argmax` promises no order among equals.
            token = torch.where(largest == highest[:, None], token, head.shape[0])
            return token.amin(dim=1), -normaliser
        goal = uniform.clamp(max=BELOW_ONE) * group_end[:, -1]
        group = (group_end <= goal[:, None]).sum(dim=1)
        before = group_end.gather(1, (group - 1).clamp(min=0)[:, None])[:, 0]
        rest = goal - torch.where(group > 0, before, 0.0)
        tokens, logits = product.draw(group.to(torch.int32), rest, highest)
        return tokens, logits - highest - normaliser


class _Product:
    """`hidden head^T` that is never there as a whole."""

    def __init__(self, hidden, head, temperature, soft_cap):
        self.hidden, self.head = hidden, head
        self.tiles = choose_tiles(hidden.dtype, capability_of(hidden))
        self.sizes = (
            hidden.shape[0],
            head.shape[0],
            hidden.shape[1],
            hidden.stride(0),
            *head.stride(),
            float(temperature),
            float(soft_cap or 0.0),
        )
        self.settings = {
            "HAS_CAP": soft_cap is not None,
            "COLUMNS": GROUP,
            "num_warps": self.tiles.num_warps,
            "num_stages": self.tiles.num_stages,
        }

    def reduce(self):
        """`(largest, total, token)` of every group, each `[R, groups]`."""
        rows, columns = self.sizes[:2]
        groups = triton.cdiv(columns, GROUP)
        found = [
            torch.empty((rows, groups), dtype=dtype, device=self.hidden.device)
            for dtype in (torch.float32, torch.float32, torch.int32)
        ]
        reduce_groups[triton.cdiv(rows, self.tiles.rows), groups](
            self.hidden, self.head, *found, *self.sizes, groups,
            ROWS=self.tiles.rows, DEPTH=self.tiles.depth,
            **dot_settings(), **self.settings,
        )  # fmt: skip
        return found

    def draw(self, groups, goals, highest):
        """`(tokens, logits)` of the groups, each `[R]`."""
        rows = self.sizes[0]
        tokens, logits = (
            torch.empty((rows,), dtype=dtype, device=self.hidden.device)
            for dtype in (torch.int32, torch.float32)
        )
        draw_in_group[triton.cdiv(rows, self.tiles.draw_rows),](
            self.hidden, self.head, groups, goals, highest, tokens, logits,
            *self.sizes, BELOW_ONE, ROWS=self.tiles.draw_rows,
            DEPTH=self.tiles.draw_depth, **self.settings,
        )  # fmt: skip
        return tokens, logits
