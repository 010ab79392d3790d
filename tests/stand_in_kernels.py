"""Kernels for the CPU that stand in for those of accelerators: good and broken ones.

They are found by name in the process that tries them.
"""

import os
import time

import keras
from keras import ops

from keras_ebft.kernels.linear_logprob.chunked import linear_logprob_chunked
from keras_ebft.kernels.linear_logprob.reference import linear_logprob_reference


def good(*tensors, **options):
    return linear_logprob_chunked(*tensors, **options)


def plain(*tensors, **options):
    """What runs in the stand-ins' place: too slow for anyone."""
    return slow(*tensors, **options)


def slow(hidden, head, labels, **options):
    """Right, after a product that nobody needs and no compiler can leave out."""
    waste = ops.tanh(hidden[0, 0]) * ops.ones((1500, 1500), dtype=hidden.dtype)
    waste = ops.cast(ops.sum(ops.tanh(waste @ waste)), "float32")
    log_prob, entropy = linear_logprob_reference(hidden, head, labels, **options)
    return log_prob + 1e-30 * waste, entropy


def wrong_output(hidden, head, labels, **options):
    log_prob, entropy = linear_logprob_reference(hidden, head, labels, **options)
    return log_prob, entropy * 1.001


def wrong_gradient(hidden, head, labels, **options):
    head = head + 1e-3 * (head - ops.stop_gradient(head))
    return linear_logprob_reference(hidden, head, labels, **options)


def wrong_where_large(hidden, head, labels, **options):
    """Right at every size but the call's own."""
    if hidden.shape[0] > 400:
        labels = labels * 0
    return linear_logprob_reference(hidden, head, labels, **options)


def unwritten(hidden, head, labels, **options):
    """The last row is never written: what memory held before comes out."""
    log_prob, entropy = linear_logprob_reference(hidden, head, labels, **options)
    memory = _unwritten_like(log_prob)
    last = ops.arange(log_prob.shape[0]) == log_prob.shape[0] - 1
    return ops.where(last, memory, log_prob), entropy


def _unwritten_like(tensor):
    if keras.backend.backend() == "torch":
        import torch

        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
    import jax
    from jax.experimental import pallas

    def write_nothing(memory):
        del memory

    shape = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    return pallas.pallas_call(write_nothing, out_shape=shape, interpret=True)()


def raising(*tensors, **options):
    raise RuntimeError("no such instruction")


def out_of_memory(*tensors, **options):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def hanging(*tensors, **options):
    time.sleep(3600)


def crashing(*tensors, **options):
    os._exit(7)
