"""Samplers: how rollouts continue the documents."""

from keras_ebft.samplers.block_sampler import BlockSampler
from keras_ebft.samplers.replay_sampler import ReplaySampler
from keras_ebft.samplers.stopping import before_stop, ended

__all__ = ["BlockSampler", "ReplaySampler", "before_stop", "ended"]
