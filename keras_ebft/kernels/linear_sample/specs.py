"""Shapes and options for tests and benchmarks of `linear_sample`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from keras import ops


@dataclass(frozen=True)
class Spec:
    """One call: R rows of width D, V tokens; see the signature."""

    name: str
    rows: int = 37
    width: int = 24
    vocabulary: int = 300
    temperature: float = 1.0
    top_k: Any = None
    top_p: float = 1.0
    soft_cap: Any = None

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = False

    def shapes(self):
        """Shapes of the floating-point tensors, by name."""
        return {
            "hidden": (self.rows, self.width),
            "head": (self.vocabulary, self.width),
        }

    def arrays(self, seed=0):
        """Dict of float32 NumPy arrays."""
        random = np.random.default_rng(seed)
        hidden = random.normal(size=(self.rows, self.width))
        head = random.normal(size=(self.vocabulary, self.width))
        scale = 2.0 * self.width**-0.5
        return {
            "hidden": hidden.astype("float32"),
            "head": (scale * head).astype("float32"),
        }

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a tuple."""
        places = ops.convert_to_tensor(self.places())
        return lambda *tensors: run(*tensors, places, **self.options())

    def places(self):
        """Uniform numbers, float32 `[R]`, with the ends of their range."""
        uniform = np.random.default_rng(7).random(self.rows)
        uniform[0], uniform[-1] = 0.0, 1.0 - 2.0**-24
        return uniform.astype("float32")

    def options(self):
        """Keyword arguments that are no tensors."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "soft_cap": self.soft_cap,
        }

    def in_use(self):
        """Names of the options in use, as the dispatcher knows them."""
        used = {
            "soft_cap": self.soft_cap is not None,
            "top_k": self.top_k is not None,
            "top_p": self.top_p < 1.0,
            "greedy": self.temperature == 0.0,
        }
        return frozenset(name for name, value in used.items() if value)


# Every option off its default, sizes that divide nothing.
SPECS = (
    Spec("plain"),
    Spec("one_row", rows=1),
    Spec("capped", rows=50, temperature=0.6, soft_cap=2.0),
    Spec("greedy", temperature=0.0),
    Spec("greedy_capped", rows=50, vocabulary=257, temperature=0.0, soft_cap=2.0),
    Spec("top_k", top_k=5),
    Spec("everything", temperature=1.7, soft_cap=2.0, top_k=40, top_p=0.7),
)
# One step of the rollouts of one document under Llama 3.2 1B: n=4, K=127.
BENCHMARK = Spec(
    "llama_1b", rows=4 * 127, width=2048, vocabulary=128256, temperature=0.6
)
# The same where there is no accelerator.
SMALL = replace(BENCHMARK, name="small", rows=124, width=256, vocabulary=8192)
# What an implementation is timed with at most, with as large a vocabulary as asked.
MOST_ROWS = 8192


def like(shapes, options, settings):
    """Specs to check and to time an implementation with, for a call of this path.

    Args:
        shapes: tuple of the shapes of hidden states and head.
        options: frozenset of names of the options in use.
        settings: dict of the call's settings.

    Returns:
        `(checks, timing)`: small ragged specs, and one shaped like the call, of at
        most `MOST_ROWS` rows.
    """
    del options
    (rows, width), (vocabulary, _) = shapes
    call = Spec(
        "call",
        min(rows, MOST_ROWS),
        width,
        vocabulary,
        settings["temperature"],
        settings["top_k"],
        settings["top_p"],
        settings["soft_cap"],
    )
    ragged = replace(call, name="ragged", rows=37, width=24, vocabulary=300)
    longer = replace(call, name="longer", rows=301, width=72, vocabulary=1027)
    return (ragged, longer), call
