"""The hot paths, one folder each, and the choice between their implementations.

To add an op, do:

1. write the definition in `keras.ops`, as plainly as the equation, in
   `<op>/reference.py`;
2. list it last in `<op>/implementations.py`, one `Implementation` record each, best
   first;
3. write the public function in `<op>/__init__.py`, which registers them, and the calls
   it is tested and measured with in `<op>/specs.py`;
4. add a contract to `tests/kernel_contracts.py`, and a class per implementation to
   `tests/test_kernel_contracts.py`;
5. add its name below and its row to `docs/kernels.md`.

A faster implementation of an op that is there needs 2 and 4 alone, and
`unproven=True` until it has run on its hardware: until then `qualification` tries it
wherever it is to run, before it runs.
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
from keras_ebft.kernels.projection import projection
from keras_ebft.kernels.strided_attention import strided_attention

__all__ = [
    "causal_attention",
    "feature_reward",
    "implementations",
    "linear_logprob",
    "linear_sample",
    "projection",
    "set_implementation",
    "strided_attention",
    "watch_choices",
]
