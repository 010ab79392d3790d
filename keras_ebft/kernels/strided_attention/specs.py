"""Shapes and options for tests and benchmarks of `strided_attention`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_ebft.kernels.spec_arrays import normal_arrays


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
    tensor_offset: bool = False

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = True

    def shapes(self):
        """Shapes of the tensors that have gradients, by name."""
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
        return shapes

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
        return normal_arrays(self.shapes(), seed)

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a tuple."""
        anchors, starts = self.places()
        if self.tensor_anchors:
            anchors = ops.convert_to_tensor(anchors)
        starts = None if starts is None else ops.convert_to_tensor(starts)
        options = self.options()
        if self.tensor_offset:
            options["query_offset"] = ops.convert_to_tensor(self.query_offset, "int32")

        def function(*tensors):
            places = () if anchors is None else (anchors,)
            return (run(*tensors, *places, starts=starts, **options),)

        return function

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
            "tensor_offset": self.tensor_offset,
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
# The same where there is no accelerator.
SMALL = replace(
    BENCHMARK, name="small", blocks=31, heads=4, kv_heads=2, length=256
)  # fmt: skip


def like(shapes, options, settings):
    """Specs to check and to time an implementation with, for a call of this path.

    Args:
        shapes: tuple of the shapes of query, key, value and the document's key and
            value, which may be `None`.
        options: frozenset of names of the options in use.
        settings: dict of the call's settings.

    Returns:
        `(checks, timing)`: small ragged specs, and one shaped like the call, of at
        most four documents.
    """
    batch, samples, blocks, queries, heads, size = shapes[0]
    keys, kv_heads = shapes[1][3:5]
    document = shapes[3] is not None
    length = shapes[3][1] if document else 1
    call = Spec(
        "call", min(batch, 4), samples, blocks, queries, keys, heads, kv_heads, size,
        length=length,
        stride=max(1, length // (blocks + 1)),
        document=document,
        starts="starts" in options,
        tensor_anchors="tensor_anchors" in options,
        query_offset=keys - queries,
        sliding_window=settings["sliding_window"],
        soft_cap=settings["soft_cap"],
        scale=settings["scale"],
        tensor_offset="tensor_offset" in options,
    )  # fmt: skip
    window = None if call.sliding_window is None else 6
    ragged = replace(
        call, name="ragged", batch=2, samples=min(samples, 3), blocks=5,
        heads=2 * heads // kv_heads, kv_heads=2, length=37, stride=7,
        sliding_window=window,
    )  # fmt: skip
    longer = replace(ragged, name="longer", batch=1, blocks=37, length=301, stride=8)
    return (ragged, longer), call
