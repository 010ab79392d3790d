"""Reward objects: rollouts in, rewards of every rollout out."""

import keras
import numpy as np
from keras import ops

from keras_ebft import functional
from keras_ebft.configurable import Configurable
from keras_ebft.inner_products import WHITENINGS
from keras_ebft.kernels import feature_reward
from keras_ebft.validation import (
    check_choice,
    check_int,
    check_number,
    check_some_weight,
)


class Reward(Configurable):
    """Base class of rewards.

    A subclass of one's own defines `__call__(generated, target, rollouts)`, which
    returns a dict of float32 tensors `[B, n, K]`: `alignment`, the part of each
    rollout's reward that no other rollout of its block enters; `diversity`, the
    part that sums over pairs of rollouts (0 if there is none); and `reward`, their
    weighted difference. Baselines need the two apart. Further entries `[B, K]`,
    named in `block_measures`, are measured and averaged by `fit`.

    Attributes:
        needs_features: whether `generated` and `target` are used at all.
        runs_python: whether it calls Python code that cannot be compiled.
        block_measures: names of its own measures per block.
        alignment_weight, diversity_weight: the two parts' weights in `reward`.
    """

    needs_features = True
    runs_python = False
    block_measures = ()
    alignment_weight = 1.0
    diversity_weight = 1.0

    def prepare(self, causal_lm):
        """Called once with the model whose rollouts will be rewarded."""

    def __call__(self, generated, target, rollouts=None):
        """Rewards of every rollout.

        Args:
            generated: float tensor `[B, n, K, F, D]`, features of the rollouts;
                `None` if `needs_features` is false.
            target: float tensor `[B, K, F, D]`, features of the true texts.
            rollouts: `RolloutBatch`, their tokens.
        """
        raise TypeError(
            f"Expected {type(self).__name__} to define __call__(generated, target, "
            "rollouts). See keras_ebft.rewards.Reward."
        )

    def judge(self, generated, target, rollouts, estimator):
        """Rewards and advantages of every rollout, as a step uses them.

        Args:
            generated: as `__call__` takes it.
            target: as `__call__` takes it.
            rollouts: as `__call__` takes them.
            estimator: name of the baseline.

        Returns:
            What `__call__` returns, and `advantage`.
        """
        rewards = self(generated, target, rollouts)
        return {**rewards, "advantage": self.advantages(rewards, estimator)}

    def advantages(self, rewards, estimator):
        """Advantages of what `__call__` returned, of the shape of its rewards.

        Args:
            rewards: dict with `alignment` and `diversity`.
            estimator: name of the baseline, see
                `keras_ebft.functional.advantages`.
        """
        return functional.advantages(
            rewards["alignment"],
            rewards["diversity"],
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
            estimator=estimator,
        )


@keras.saving.register_keras_serializable("keras_ebft")
class FeatureMatchingReward(Reward):
    """Rewards rollouts whose features match the true continuation's.

    See `keras_ebft.functional.feature_matching_rewards` for the equations
    (arXiv:2603.12248). With `"token"` pooling every generated token is rewarded
    by itself.

    Args:
        alignment_weight: float, not negative.
        diversity_weight: float, not negative.
        whitening: `"rollout"` (as the authors' code), `"feature"` (as the
            paper's appendix) or `None`. Eigenvalues below 1e-6 of the largest
            count as zero.

    Attributes:
        measures_unbiased: bool, whether `unbiased_feature_matching_loss` is measured
            too, which takes at least 2 rollouts per block.
            `keras_ebft.evaluation.FeatureMatching` turns it on for itself.

    Raises:
        TypeError: if a weight is not a number.
        ValueError: if a weight is negative, both are zero, or `whitening` is
            unknown.

    Example:
    >>> FeatureMatchingReward(diversity_weight=0.5).get_config()["whitening"]
    'rollout'
    """

    measures_unbiased = False

    def __init__(self, alignment_weight=1.0, diversity_weight=1.0, whitening="rollout"):
        self.alignment_weight = check_number("alignment_weight", alignment_weight, 0.0)
        self.diversity_weight = check_number("diversity_weight", diversity_weight, 0.0)
        check_some_weight(
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
        )
        self.whitening = check_choice("whitening", whitening, WHITENINGS)

    @property
    def block_measures(self):
        """Names of what `__call__` measures once per block."""
        name = "feature_matching_loss"
        whitened = () if self.whitening is None else (f"whitened_{name}",)
        unbiased = (f"unbiased_{name}",) if self.measures_unbiased else ()
        return (name, *whitened, *unbiased)

    def __call__(self, generated, target, rollouts=None):
        """Rewards and distances of every block.

        Args:
            generated: float tensor `[B, n, K, F, D]` or `[B, n, K, G, F, D]`.
            target: float tensor `[B, K, F, D]` or `[B, K, G, F, D]`.
            rollouts: not used.

        None of it has a gradient.

        Returns:
            dict of float32 tensors: `alignment`, `diversity`, `reward`
            `[B, n, K]`; `feature_matching_loss` `[B, K]`, without whitening; and
            where whitening is on `whitened_feature_matching_loss` `[B, K]`; with
            `measures_unbiased` `unbiased_feature_matching_loss` `[B, K]`. With
            one feature per token `[B, n, K, G]` and `[B, K, G]`.
        """
        rewards = self._match(generated, target, "reinforce")
        del rewards["advantage"]
        return rewards

    def judge(self, generated, target, rollouts, estimator):
        """`__call__` and `advantages` in one operation."""
        own = type(self)
        if (
            own.__call__ is not FeatureMatchingReward.__call__
            or own.advantages is not FeatureMatchingReward.advantages
        ):
            # A subclass that defines either is judged by what it defines.
            return super().judge(generated, target, rollouts, estimator)
        return self._match(generated, target, estimator)

    def _match(self, generated, target, estimator):
        if len(generated.shape) == 6:
            return _per_token(self._match, generated, target, estimator)
        return feature_reward(
            generated,
            target,
            whitening=self.whitening,
            alignment_weight=self.alignment_weight,
            diversity_weight=self.diversity_weight,
            estimator=estimator,
            unbiased=self.measures_unbiased,
        )

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "alignment_weight": self.alignment_weight,
            "diversity_weight": self.diversity_weight,
            "whitening": self.whitening,
        }


@keras.saving.register_keras_serializable("keras_ebft")
class CharacteristicFunctionReward(FeatureMatchingReward):
    """Matches the whole distribution of features, not only their mean.

    Features phi are mapped to random Fourier features (Rahimi and Recht, 2007)

        psi(phi) = [cos(w_1 phi), ..., cos(w_m phi), sin(w_1 phi), ...] / sqrt(m)

    with frequencies `w ~ N(0, 1 / bandwidth^2)`, drawn once. The mean of psi is
    the characteristic function of the features' distribution at the m
    frequencies, so feature matching on psi compares distributions: its loss is
    the squared maximum mean discrepancy of a Gaussian kernel of that bandwidth,
    up to the sampling of frequencies.

    Args:
        alignment_weight: float, not negative.
        diversity_weight: float, not negative.
        whitening: as for `FeatureMatchingReward`; by default `None`, for which
            the loss is the discrepancy itself.
        num_frequencies: int, m.
        bandwidth: float above 0, in units of the (unit-length) features.
        seed: int, decides the frequencies.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    >>> CharacteristicFunctionReward(num_frequencies=64).whitening is None
    True
    """

    def __init__(
        self,
        alignment_weight=1.0,
        diversity_weight=1.0,
        whitening=None,
        num_frequencies=256,
        bandwidth=1.0,
        seed=0,
    ):
        super().__init__(alignment_weight, diversity_weight, whitening)
        self.num_frequencies = check_int("num_frequencies", num_frequencies, 1)
        self.bandwidth = check_number("bandwidth", bandwidth, 0.0, exclusive=True)
        self.seed = check_int("seed", seed, 0)

    def __call__(self, generated, target, rollouts=None):
        """`FeatureMatchingReward` of the Fourier features."""
        frequencies = self.frequencies(generated.shape[-1])
        return super().__call__(
            _fourier_features(generated, frequencies),
            _fourier_features(target, frequencies),
        )

    def frequencies(self, width):
        """The frequencies for features of a width, float32 array `[width, m]`."""
        random = np.random.default_rng(self.seed)
        normal = random.standard_normal((width, self.num_frequencies))
        return (normal / self.bandwidth).astype("float32")

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            **super().get_config(),
            "num_frequencies": self.num_frequencies,
            "bandwidth": self.bandwidth,
            "seed": self.seed,
        }


def _per_token(match, generated, target, estimator):
    """Rewards with every token as a block of its own."""
    batch, samples, blocks, steps, *feature = generated.shape
    flat = match(
        ops.reshape(generated, (batch, samples, blocks * steps, *feature)),
        ops.reshape(target, (batch, blocks * steps, *feature)),
        estimator,
    )
    return {
        name: ops.reshape(value, (*value.shape[:-1], blocks, steps))
        for name, value in flat.items()
    }


def _fourier_features(features, frequencies):
    phase = ops.matmul(ops.cast(features, "float32"), frequencies)
    scale = frequencies.shape[1] ** -0.5
    return scale * ops.concatenate([ops.cos(phase), ops.sin(phase)], axis=-1)
