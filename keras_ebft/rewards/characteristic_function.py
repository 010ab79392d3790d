"""Matching of whole distributions of features, through random frequencies."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ebft.records import Rollouts
from keras_ebft.rewards.feature_matching import FeatureMatchingReward
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_int, check_number


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
        normalize: as for `FeatureMatchingReward`, of the Fourier features.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    >>> CharacteristicFunctionReward(num_frequencies=64).whitening is None
    True
    """

    def __init__(
        self,
        alignment_weight: float = 1.0,
        diversity_weight: float = 1.0,
        whitening: str | None = None,
        num_frequencies: int = 256,
        bandwidth: float = 1.0,
        seed: int = 0,
        normalize: str = "auto",
    ) -> None:
        super().__init__(alignment_weight, diversity_weight, whitening, normalize)
        self.num_frequencies = check_int("num_frequencies", num_frequencies, 1)
        self.bandwidth = check_number("bandwidth", bandwidth, 1e-6, 1e6)
        self.seed = check_int("seed", seed, 0)

    def __call__(
        self, generated: Tensor, target: Tensor, rollouts: Rollouts | None = None
    ) -> dict[str, Tensor]:
        """`FeatureMatchingReward` of the Fourier features."""
        frequencies = self.frequencies(generated.shape[-1])
        return super().__call__(
            _fourier_features(generated, frequencies),
            _fourier_features(target, frequencies),
        )

    def frequencies(self, width: int) -> np.ndarray:
        """The frequencies for features of a width, float32 array `[width, m]`."""
        random = np.random.default_rng(self.seed)
        normal = random.standard_normal((width, self.num_frequencies))
        return (normal / self.bandwidth).astype("float32")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            **super().get_config(),
            "num_frequencies": self.num_frequencies,
            "bandwidth": self.bandwidth,
            "seed": self.seed,
        }


def _fourier_features(features: Tensor, frequencies: np.ndarray) -> Tensor:
    phase = ops.matmul(ops.cast(features, "float32"), frequencies)
    scale = frequencies.shape[1] ** -0.5
    return scale * ops.concatenate([ops.cos(phase), ops.sin(phase)], axis=-1)
