"""Shapes and options for tests and benchmarks of `feature_reward`."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Spec:
    """One call: B documents, n samples, K blocks, F features of width D.

    `kind` says how the n rollouts of every block lie: `"random"`, `"duplicates"`
    (the first two are one), `"same"` (all are one) or `"deficient"` (the last is
    the sum of the others).
    """

    name: str
    batch: int = 2
    samples: int = 4
    blocks: int = 3
    features: int = 1
    width: int = 40
    kind: str = "random"
    whitening: Any = "rollout"
    alignment_weight: float = 1.0
    diversity_weight: float = 1.0
    estimator: str = "rloo"
    unbiased: bool = False

    # Whether its outputs have gradients by the tensors.
    differentiable: ClassVar[bool] = False

    def shapes(self):
        """Shapes of the floating-point tensors, by name."""
        features = (self.blocks, self.features, self.width)
        return {
            "generated": (self.batch, self.samples, *features),
            "target": (self.batch, *features),
        }

    def arrays(self, seed=0):
        """Dict of float32 NumPy arrays."""
        random = np.random.default_rng(seed)
        shapes = self.shapes()
        generated = random.normal(size=shapes["generated"])
        target = random.normal(size=shapes["target"])
        target += generated.mean(axis=1)
        if self.kind == "duplicates":
            generated[:, 1] = generated[:, 0]
        elif self.kind == "same":
            generated[:] = generated[:, :1]
        scale = self.width**-0.5
        if self.kind == "deficient":
            # Of few bits, so that the sum is one in bfloat16 too: an eigenvalue that
            # rounding alone made is inverted as if it were one.
            generated = np.round(2.0 * generated) / 2.0
            generated[:, -1] = generated[:, :-1].sum(axis=1)
            scale = 2.0 ** np.round(np.log2(scale))
        return {
            "generated": (scale * generated).astype("float32"),
            "target": (scale * target).astype("float32"),
        }

    def bind(self, run):
        """An implementation as a function of `arrays` alone, returns a dict."""
        return lambda *tensors: run(*tensors, **self.options())

    def options(self):
        """Keyword arguments that are no tensors."""
        return {
            "whitening": self.whitening,
            "alignment_weight": self.alignment_weight,
            "diversity_weight": self.diversity_weight,
            "estimator": self.estimator,
            "unbiased": self.unbiased,
        }

    def in_use(self):
        """Names of the options in use, as the dispatcher knows them."""
        return frozenset(["many_samples"] if self.samples > 16 else [])


WEIGHTS = {"alignment_weight": 0.7, "diversity_weight": 0.3}
# Every option off its default, sizes that divide nothing.
SPECS = (
    Spec("plain"),
    Spec("one_sample", samples=1, width=5),
    Spec("two_samples", samples=2, estimator="group_norm"),
    Spec("sixteen", batch=1, samples=16, blocks=2, width=300, unbiased=True),
    Spec("feature", samples=5, whitening="feature", unbiased=True),
    Spec("no_whitening", samples=3, whitening=None, estimator="reinforce"),
    Spec("duplicates", kind="duplicates", features=2, **WEIGHTS),
    Spec("same", samples=7, kind="same"),
    Spec("deficient", samples=6, kind="deficient", estimator="group_norm"),
    Spec("deficient_feature", kind="deficient", whitening="feature"),
    Spec(
        "everything",
        samples=9,
        blocks=2,
        features=3,
        width=70,
        kind="duplicates",
        estimator="group_norm",
        unbiased=True,
        **WEIGHTS,
    ),
)
# One document of 1024 tokens under Llama 3.2 1B, three layers as one feature.
BENCHMARK = Spec("llama_1b", batch=4, blocks=127, width=3 * 2048)
# The same where there is no accelerator.
SMALL = replace(BENCHMARK, name="small", batch=1, blocks=31, width=768)


def like(shapes, options, settings):
    """Specs to check and to time an implementation with, for a call of this path.

    Args:
        shapes: tuple of the shapes of generated and target features.
        options: frozenset of names of the options in use.
        settings: dict of the call's settings.

    Returns:
        `(checks, timing)`: small ragged specs, the second with two rollouts that are
        one, and one shaped like the call, of at most four documents.
    """
    del options
    batch, samples, blocks, features, width = shapes[0]
    call = Spec("call", min(batch, 4), samples, blocks, features, width, **settings)
    ragged = replace(call, name="ragged", batch=2, blocks=3, width=40)
    kind = "duplicates" if samples > 1 else "random"
    return (ragged, replace(ragged, name=kind, kind=kind, width=301)), call
