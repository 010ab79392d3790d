"""What all Pallas kernels over the output head share."""

import jax.numpy as jnp
from jax import lax

# The logit of a token that is not there.
HIDDEN_LOGIT = -1e30


def scaled(logits, options):
    """The cap and the temperature of logits; both are attributes of `options`."""
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits * (1.0 / options.soft_cap))
    return logits * (1.0 / options.temperature)


def dot(one, two, one_axis, two_axis):
    """Product summed over one axis of each, in float32."""
    axes = (((one_axis,), (two_axis,)), ((), ()))
    return lax.dot_general(one, two, axes, preferred_element_type=jnp.float32)
