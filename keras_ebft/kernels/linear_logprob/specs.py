"""Shapes and options for tests and benchmarks of `linear_logprob`."""

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
    soft_cap: Any = None

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = True

    def shapes(self):
        """Shapes of the tensors that have gradients, by name."""
        return {
            "hidden": (self.rows, self.width),
            "head": (self.vocabulary, self.width),
        }

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
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
        """Labels, int32 `[R]`, with the first and the last token among them."""
        labels = np.random.default_rng(7).integers(0, self.vocabulary, self.rows)
        labels[0], labels[-1] = 0, self.vocabulary - 1
        return labels.astype("int32")

    def options(self):
        """Keyword arguments that are no tensors."""
        return {"temperature": self.temperature, "soft_cap": self.soft_cap}

    def in_use(self):
        """Names of the options in use, as the dispatcher knows them."""
        return frozenset() if self.soft_cap is None else frozenset(["soft_cap"])


# Every option off its default, sizes that divide nothing.
SPECS = (
    Spec("plain"),
    Spec("sampled", temperature=0.6),
    Spec("one_row", rows=1),
    Spec("everything", rows=50, temperature=1.7, soft_cap=2.0),
)
# Small enough for finite differences, with everything in use.
TINY = Spec("tiny", rows=3, width=4, vocabulary=7, temperature=0.7, soft_cap=2.0)
# The head of Llama 3.2 1B over the rollouts of one document: n=4, K=127, G=8.
BENCHMARK = Spec(
    "llama_1b", rows=4 * 127 * 8, width=2048, vocabulary=128256, temperature=0.6
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
        settings["soft_cap"],
    )
    ragged = replace(call, name="ragged", rows=37, width=24, vocabulary=300)
    longer = replace(call, name="longer", rows=301, width=72, vocabulary=1027)
    return (ragged, longer), call
