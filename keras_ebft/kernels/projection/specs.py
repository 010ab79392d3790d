"""Shapes for tests and benchmarks of `projection`."""

from dataclasses import dataclass, replace
from typing import ClassVar

from keras_ebft.kernels.spec_arrays import normal_arrays


@dataclass(frozen=True)
class Spec:
    """One call: R rows of width C, N outputs each; see the signature."""

    name: str
    rows: int = 37
    width: int = 24
    outputs: int = 30

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = True

    def shapes(self):
        """Shapes of the tensors that have gradients, by name."""
        return {
            "inputs": (self.rows, self.width),
            "kernel": (self.width, self.outputs),
        }

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
        return normal_arrays(self.shapes(), seed)

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a tuple."""
        return lambda *tensors: (run(*tensors),)

    def options(self):
        """Keyword arguments that are no tensors: there are none."""
        return {}

    def in_use(self):
        """Names of the options in use: there are none."""
        return frozenset()


# Sizes that divide nothing.
SPECS = (Spec("plain"), Spec("one_row", rows=1), Spec("wide", 50, 7, 129))
# Small enough for finite differences.
TINY = Spec("tiny", rows=3, width=4, outputs=5)
# The widest layer of Llama 3.2 1B over the rollouts of one document: n=4, K=127, G=8.
BENCHMARK = Spec("llama_1b", rows=4 * 127 * 8, width=2048, outputs=8192)
# That of SmolLM2-135M over those of a shorter one, one step of sampling.
SMALL = replace(BENCHMARK, name="small", rows=120, width=576, outputs=1536)
# What an implementation is timed with at most.
MOST_ROWS = 8192


def like(shapes, options, settings):
    """Specs to check and to time an implementation with, for a call of this path.

    Args:
        shapes: tuple of the shapes of inputs and kernel.
        options: frozenset of names of the options in use.
        settings: dict of the call's settings.

    Returns:
        `(checks, timing)`: small ragged specs, and one shaped like the call, of at
        most `MOST_ROWS` rows.
    """
    del options, settings
    (rows, width), (_, outputs) = shapes
    return SPECS, Spec("call", min(rows, MOST_ROWS), width, outputs)
