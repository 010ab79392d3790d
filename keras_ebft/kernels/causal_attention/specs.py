"""Shapes and options for tests and benchmarks of `causal_attention`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_ebft.kernels.spec_arrays import normal_arrays


@dataclass(frozen=True)
class Spec:
    """One call: B rows of T tokens; see the signature."""

    name: str
    batch: int = 2
    length: int = 13
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    starts: bool = False
    sliding_window: Any = None
    soft_cap: Any = None
    scale: float = 0.4

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = True

    def shapes(self):
        """Shapes of the tensors that have gradients, by name."""
        heads = {"query": self.heads, "key": self.kv_heads, "value": self.kv_heads}
        return {
            name: (self.batch, self.length, count, self.head_size)
            for name, count in heads.items()
        }

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
        return normal_arrays(self.shapes(), seed)

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a tuple."""
        places = self.places()
        starts = None if places is None else ops.convert_to_tensor(places)
        return lambda *tensors: (run(*tensors, starts=starts, **self.options()),)

    def places(self):
        """First token of each token's document, int32 `[B, T]`, or `None`."""
        if not self.starts:
            return None
        index = np.arange(self.length, dtype="int32")
        rows = [index // (5 + row) * (5 + row) for row in range(self.batch)]
        return np.stack(rows).astype("int32")

    def options(self):
        """Keyword arguments that are no tensors."""
        return {
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "soft_cap": self.soft_cap,
        }

    def in_use(self):
        """Names of the options in use, as the dispatcher knows them."""
        used = {
            "starts": self.starts,
            "sliding_window": self.sliding_window is not None,
            "soft_cap": self.soft_cap is not None,
        }
        return frozenset(name for name, value in used.items() if value)


EVERYTHING = {"starts": True, "sliding_window": 3, "soft_cap": 1.5}

# Every option off its default, sizes that divide nothing.
SPECS = (
    Spec("plain", length=37),
    Spec("window", sliding_window=4, heads=2),
    Spec("capped", soft_cap=1.5, kv_heads=1, head_size=5),
    Spec("packed", starts=True),
    Spec("two_tokens", length=2),
    Spec("everything", **EVERYTHING),
)
# Small enough for finite differences, with everything in use.
TINY = Spec("tiny", batch=1, length=8, head_size=3, **EVERYTHING)
# The attention of Llama 3.2 1B.
BENCHMARK = Spec(
    "llama_1b", batch=1, length=1024, heads=32, kv_heads=8, head_size=64, scale=0.125
)
# The same where there is no accelerator.
SMALL = replace(BENCHMARK, name="small", length=256, heads=4, kv_heads=2)


def like(shapes, options, settings):
    """Specs to check and to time an implementation with, for a call of this path.

    Args:
        shapes: tuple of the shapes of query, key and value.
        options: frozenset of names of the options in use.
        settings: dict of the call's settings.

    Returns:
        `(checks, timing)`: small ragged specs, and one shaped like the call, of at
        most four rows.
    """
    batch, length, heads, size = shapes[0]
    kv_heads = shapes[1][2]
    call = Spec(
        "call",
        min(batch, 4),
        length,
        heads,
        kv_heads,
        size,
        "starts" in options,
        settings["sliding_window"],
        settings["soft_cap"],
        settings["scale"],
    )
    window = None if call.sliding_window is None else 6
    ragged = replace(
        call, name="ragged", batch=2, length=37, heads=2 * heads // kv_heads,
        kv_heads=2, sliding_window=window,
    )  # fmt: skip
    return (ragged, replace(ragged, name="longer", batch=1, length=301)), call
