"""`linear_sample` from what the Pallas kernels find: two passes over the head.

The first keeps two numbers for every group of `GROUP` tokens, which tell the group
that a uniform number falls into; the second computes that group's logits again.
Groups and search are those of the definition.
"""

import jax.numpy as jnp

from keras_ebft.kernels.linear_sample.reference import (
    GROUP,
    find_group,
    find_in_group,
    take,
)


def draw(largest, total, group_logits, uniform, vocabulary):
    """Tokens and their log-probabilities.

    Args:
        largest: float32 `[R, groups]`, the largest logit z of each group.
        total: float32 `[R, groups]`, `sum exp(z - largest)`.
        group_logits: function of groups, int32 `[R]`, that returns their logits,
            float32 `[R, GROUP]`, anything for tokens past the vocabulary.
        uniform: float32 `[R]`.
        vocabulary: int.

    Returns:
        `(token_ids, log_prob)`, int32 and float32 `[R]`.
    """
    highest = jnp.max(largest, axis=1, keepdims=True)
    totals = total * jnp.exp(largest - highest)
    group, rest = find_group(totals, uniform)
    logits = group_logits(group) - highest
    exists = group[:, None] * GROUP + jnp.arange(GROUP) < vocabulary
    place = find_in_group(jnp.where(exists, jnp.exp(logits), 0.0), rest)
    log_prob = take(logits, place) - jnp.log(jnp.sum(totals, axis=1))
    return group * GROUP + place, log_prob


def take_likeliest(largest, total, token, vocabulary):
    """The same for temperature 0; `token` int32 `[R, groups]`, that of `largest`."""
    highest = jnp.max(largest, axis=1, keepdims=True)
    totals = total * jnp.exp(largest - highest)
    # The first of the likeliest.
    token = jnp.min(jnp.where(largest == highest, token, vocabulary), axis=1)
    return token, -jnp.log(jnp.sum(totals, axis=1))
