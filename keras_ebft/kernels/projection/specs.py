"""Shapes for tests and benchmarks of `projection`."""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

from keras_ebft.kernels.spec_arrays import normal_arrays


@dataclass(frozen=True)
class Spec:
    """One call: rows of `width`, `outputs` of each; see the signature."""

    name: str
    rows: tuple = (37,)
    width: tuple = (24,)
    outputs: tuple = (30,)

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = True

    def shapes(self):
        """Shapes of the tensors that have gradients, by name."""
        return {
            "inputs": (*self.rows, *self.width),
            "kernel": (*self.width, *self.outputs),
        }

    def arrays(self, seed=0):
        """The tensors that have gradients: dict of float32 NumPy arrays."""
        return normal_arrays(self.shapes(), seed)

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a tuple."""
        run = functools.partial(run, **self.options())
        return lambda *tensors: (run(*tensors),)

    def options(self):
        """Keyword arguments that are no tensors."""
        return {"axes": len(self.width)}

    def in_use(self):
        """Names of the options in use: there are none."""
        return frozenset()


# Sizes that divide nothing; as attention projects to heads, and back from them.
SPECS = (
    Spec("plain"),
    Spec("one_row", rows=(1,)),
    Spec("wide", (50,), (7,), (129,)),
    Spec("to_heads", (11, 1), (24,), (3, 10)),
    Spec("from_heads", (5, 3), (3, 10), (24,)),
)
# Small enough for finite differences.
TINY = Spec("tiny", rows=(3,), width=(2, 2), outputs=(5,))
# The widest layer of Llama 3.2 1B over the rollouts of one document: n=4, K=127, G=8.
BENCHMARK = Spec("llama_1b", rows=(4 * 127 * 8,), width=(2048,), outputs=(8192,))
# That of SmolLM2-135M over those of a shorter one, one step of sampling.
SMALL = replace(BENCHMARK, name="small", rows=(120,), width=(576,), outputs=(1536,))
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
    del options
    inputs, kernel = shapes
    width = kernel[: settings["axes"]]
    rows, outputs = inputs[: len(inputs) - len(width)], kernel[len(width) :]
    if math.prod(rows) > MOST_ROWS:
        rows = (MOST_ROWS,)
    return SPECS, Spec("call", rows, width, outputs)
