"""The hot paths, one folder each, the choice between their implementations, and the
one file that branches on the backend.
"""

from keras_ebft.kernels.causal_attention import causal_attention
from keras_ebft.kernels.dispatch import (
    implementations,
    set_implementation,
    watch_choices,
)
from keras_ebft.kernels.feature_reward import feature_reward
from keras_ebft.kernels.linear_logprob import linear_logprob
from keras_ebft.kernels.linear_sample import linear_sample
from keras_ebft.kernels.strided_attention import strided_attention

__all__ = [
    "causal_attention",
    "feature_reward",
    "implementations",
    "linear_logprob",
    "linear_sample",
    "set_implementation",
    "strided_attention",
    "watch_choices",
]
