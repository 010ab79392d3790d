"""Shapes and options for tests and benchmarks of `strided_attention`."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spec:
    """One call: B documents of T tokens, n samples of K blocks; see the signature."""

    name: str
    batch: int = 2
    samples: int = 2
    blocks: int = 5
    queries: int = 3
    keys: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    length: int = 24
    stride: int = 4
    document: bool = True
    starts: bool = False
    tensor_anchors: bool = False
    query_offset: int = 0
    sliding_window: Any = None
    soft_cap: Any = None
    scale: float = 0.4

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
        random = np.random.default_rng(seed)
        lead = (self.batch, self.samples, self.blocks)
        own = (*lead, self.keys, self.kv_heads, self.head_size)
        shapes = {
            "query": (*lead, self.queries, self.heads, self.head_size),
            "key": own,
            "value": own,
        }
        if self.document:
            shape = (self.batch, self.length, self.kv_heads, self.head_size)
            shapes |= {"document_key": shape, "document_value": shape}
        return {
            name: random.normal(size=shape).astype("float32")
            for name, shape in shapes.items()
        }

    def places(self):
        """`(anchors, starts)` as NumPy arrays, each `None` if not used.

        Anchors of their own for every row are in no order, and one block is dead:
        it sees a single token.
        """
        if not self.document:
            return None, None
        anchors = np.minimum(
            self.stride * np.arange(1, self.blocks + 1), self.length - 1
        ).astype("int32")
        if self.tensor_anchors:
            random = np.random.default_rng(7)
            anchors = np.stack([random.permutation(anchors) for _ in range(self.batch)])
            anchors[0, 0] = 1
        starts = None
        if self.starts:
            shape = (self.batch, self.blocks)
            starts = np.broadcast_to(anchors, shape) // 7 * 3
            starts = starts.astype("int32")
        return anchors, starts

    def options(self):
        """Keyword arguments that are no tensors."""
        return {
            "scale": self.scale,
            "query_offset": self.query_offset,
            "sliding_window": self.sliding_window,
            "soft_cap": self.soft_cap,
        }

    def in_use(self):
        """Names of the options in use, as the dispatcher knows them."""
        used = {
            "tensor_anchors": self.tensor_anchors,
            "starts": self.starts,
            "sliding_window": self.sliding_window is not None,
            "soft_cap": self.soft_cap is not None,
        }
        return frozenset(name for name, value in used.items() if value)


EVERYTHING = {
    "starts": True,
    "tensor_anchors": True,
    "sliding_window": 6,
    "soft_cap": 1.5,
}

# Every option off its default, sizes that divide nothing.
SPECS = (
    Spec("plain"),
    Spec("window", blocks=11, stride=2, sliding_window=5, heads=2),
    Spec("capped", soft_cap=1.5, kv_heads=1, head_size=5),
    Spec("packed", starts=True),
    Spec("any_anchors", tensor_anchors=True, samples=3),
    Spec("one_query", queries=1, keys=4, query_offset=2),
    Spec("no_document", document=False, batch=1),
    Spec("everything", **EVERYTHING),
)
# Small enough for finite differences, with everything in use.
TINY = Spec("tiny", batch=1, blocks=3, length=12, head_size=3, **EVERYTHING)
# The attention of Llama 3.2 1B: T=1024, c=s=G=8, n=4.
BENCHMARK = Spec(
    "llama_1b",
    batch=1,
    samples=4,
    blocks=127,
    queries=8,
    keys=8,
    heads=32,
    kv_heads=8,
    head_size=64,
    length=1024,
    stride=8,
    scale=0.125,
)
