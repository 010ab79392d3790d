"""The optimizer that a step calls, and the one that `compile` was given."""

import keras

from keras_ebft.objectives.critic import PolicyAndCriticOptimizer


def with_critic(optimizer, critic_optimizer, critic_variables):
    """One optimizer for policy and critic.

    What scales losses must stand around both: gradients of either are scaled.

    Args:
        optimizer: Keras optimizer of the policy, perhaps a `LossScaleOptimizer`.
        critic_optimizer: Keras optimizer.
        critic_variables: list of Keras variables; all others are the policy's.

    Returns:
        Keras optimizer.
    """
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    both = PolicyAndCriticOptimizer(
        optimizer.inner_optimizer if scaled else optimizer,
        critic_optimizer,
        critic_variables,
    )
    if not scaled:
        return both
    return keras.optimizers.LossScaleOptimizer(
        both, optimizer.initial_scale, optimizer.dynamic_growth_steps
    )


def policy_optimizer(optimizer):
    """The optimizer of the policy, without the critic's and what scales losses.

    Args:
        optimizer: that of a compiled model.
    """
    for name in ("inner_optimizer", "policy_optimizer"):
        optimizer = getattr(optimizer, name, optimizer)
    return optimizer


def policy_optimizer_config(optimizer):
    """Configuration of the policy's optimizer alone, the inverse of `with_critic`.

    The critic's is saved with the critic, and which variables are its own is for
    the model to say.

    Args:
        optimizer: what `with_critic` returned, or that within a
            `LossScaleOptimizer`, which is kept.

    Returns:
        dict, for `keras.saving.deserialize_keras_object`.
    """
    serialize = keras.saving.serialize_keras_object
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return serialize(optimizer.policy_optimizer)
    config = serialize(optimizer)
    inner = serialize(optimizer.inner_optimizer.policy_optimizer)
    return {**config, "config": {**config["config"], "inner_optimizer": inner}}
