"""`linear_sample` over chunks of rows, by PyTorch in memory that is used again.

Operations that each fill new memory wait for the operating system to hand it out: of
logits they take two to four times as long.
"""

import torch

from keras_ebft.kernels.linear_logprob.torch_in_place import scaled_logits_in_place
from keras_ebft.kernels.linear_sample.chunked import sample_chunks
from keras_ebft.kernels.linear_sample.reference import choose


def linear_sample_in_place(hidden, head, uniform, **options):
    """See `keras_ebft.kernels.linear_sample`."""
    with torch.no_grad():
        return sample_chunks(_sample, hidden, head, uniform, **options)


def _sample(hidden, head, uniform, *, temperature=1.0, soft_cap=None, **kept):
    logits = scaled_logits_in_place(
        hidden, head, temperature=temperature or 1.0, soft_cap=soft_cap
    )
    logits -= logits.amax(dim=-1, keepdim=True)
    return choose(logits, logits.exp(), uniform, temperature, **kept)
