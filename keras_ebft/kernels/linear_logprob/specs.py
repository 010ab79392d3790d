"""Shapes and options for tests and benchmarks of `linear_logprob`."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spec:
    """One call: R rows of width D, V tokens; see the signature."""

    name: str
    rows: int = 37
    width: int = 24
    vocabulary: int = 300
    temperature: float = 1.0
    soft_cap: Any = None

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
