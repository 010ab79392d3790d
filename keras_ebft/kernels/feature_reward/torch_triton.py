"""`feature_reward` for CUDA: one program per block, from features to advantages."""

from typing import NamedTuple

import torch

from keras_ebft.functional.feature_matching import (
    COSINE_EPSILON,
    GROUP_NORM_EPSILON,
    SAME_REWARDS,
)
from keras_ebft.functional.inner_products import EIGENVALUE_CUTOFF
from keras_ebft.kernels.feature_reward.jacobi import padded_size, sweeps_for
from keras_ebft.kernels.feature_reward.torch_triton_kernels import reward_blocks
from keras_ebft.kernels.torch_triton_common import on_device_of


class Tiles(NamedTuple):
    """Padded number of samples, lanes that sum over D, and compiler options."""

    size: int
    lanes: int
    num_warps: int

    def settings(self, samples, whitening, estimator):
        """Constants of the kernel."""
        return {
            "SAMPLES": samples,
            "SIZE": self.size,
            "LANES": self.lanes,
            "SWEEPS": sweeps_for(self.size),
            "WHITENING": whitening or "none",
            "ESTIMATOR": estimator,
            "CUTOFF": EIGENVALUE_CUTOFF,
            "COSINE_EPSILON": COSINE_EPSILON,
            "GROUP_NORM_EPSILON": GROUP_NORM_EPSILON,
            "SAME_REWARDS": SAME_REWARDS,
        }


def choose_tiles(samples):
    """`Tiles` for a number of samples, at most 16.

    Sums are held as `[size, size, lanes]` in registers.
    """
    size = padded_size(samples)
    if size <= 4:
        return Tiles(size, 128, 2)
    return Tiles(size, 64 if size == 8 else 16, 4)


def feature_reward_triton(
    generated,
    target,
    *,
    whitening="rollout",
    alignment_weight=1.0,
    diversity_weight=1.0,
    estimator="rloo",
    unbiased=False,
):
    """See `keras_ebft.kernels.feature_reward`."""
    batch, samples, blocks, features, width = generated.shape
    generated, target = generated.contiguous(), target.contiguous()

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=generated.device)

    rewards = [empty(batch, samples, blocks) for _ in range(4)]
    losses = [empty(batch, blocks) for _ in range(3)]
    tiles = choose_tiles(samples)
    with on_device_of(generated):
        reward_blocks[batch * blocks,](
            generated, target, *rewards, *losses, blocks, features, width,
            blocks * features * width, float(alignment_weight), float(diversity_weight),
            **tiles.settings(samples, whitening, estimator),
            num_warps=tiles.num_warps,
        )  # fmt: skip
    names = ("alignment", "diversity", "reward", "advantage")
    found = dict(zip(names, rewards))
    found["feature_matching_loss"] = losses[0]
    if whitening is not None:
        found["whitened_feature_matching_loss"] = losses[1]
    if unbiased:
        found["unbiased_feature_matching_loss"] = losses[2]
    return found
