"""A learned critic (experimental): tells true windows from generated ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_ebft.configurable import Configurable
from keras_ebft.functional.masking import masked_mean, only_where
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_bool, check_choice

SELECTIONS = ("first", "all", "closest", "only_different")


@keras.saving.register_keras_serializable("keras_ebft")
class Critic(Configurable):
    """A classifier on features, trained beside the policy, as in the authors' code.

    A linear head gives each window's features a logit `s`, and is trained on

        L_critic = - ( mean log sigmoid(s_true) - mean log sigmoid(s_generated) )

    over the rollouts that `selection` names. Alone it is a probe: `critic_loss`
    and `critic_accuracy` say how well rollouts can be told from text. With
    `train_features` the feature network learns with it, and what is matched
    becomes what tells them apart. No gradient of it reaches the policy.

    Args:
        selection: rollouts compared with the true window: `"first"`, the first
            sample; `"all"`; `"closest"`, of each block the one that looks truest
            and differs from the truth; `"only_different"`, all truths against the
            rollouts whose logit differs from the truth's.
        optimizer: Keras optimizer, its name or configuration, with a learning
            rate of its own; by default AdamW at 9e-6, betas 0.9 and 0.95.
        train_features: bool, whether the feature network learns too.

    Raises:
        TypeError: if `train_features` is not a boolean.
        ValueError: for an unknown `selection` or optimizer.

    Example:
    >>> Critic(selection="closest").train_features
    False
    """

    def __init__(
        self,
        selection: str = "first",
        optimizer: keras.optimizers.Optimizer | str | dict[str, Any] | None = None,
        train_features: bool = False,
    ) -> None:
        self.selection = check_choice("selection", selection, SELECTIONS)
        if optimizer is None:
            optimizer = keras.optimizers.AdamW(9e-6, beta_2=0.95, weight_decay=0.0)
        self.optimizer = _optimizer(optimizer)
        self.train_features = check_bool("train_features", train_features)

    def terms(
        self, true_logit: Tensor, generated_logit: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """What the critic adds to the terms of the loss.

        Args:
            true_logit: float tensor `[B, K]`.
            generated_logit: float tensor `[B, n, K]`.
            mask: float tensor `[B, n, K]`, 1 where a rollout counts.

        Returns:
            dict of float32 scalars, `critic_loss` and `critic_accuracy`.
        """
        logits = true_logit, generated_logit
        return {
            "critic_loss": critic_loss(*logits, mask, self.selection),
            "critic_accuracy": critic_accuracy(*logits, mask),
        }

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "selection": self.selection,
            "optimizer": keras.saving.serialize_keras_object(self.optimizer),
            "train_features": self.train_features,
        }


def critic_loss(
    true_logit: Tensor, generated_logit: Tensor, mask: Tensor, selection: str = "first"
) -> Tensor:
    """How badly true and generated windows are told apart; see `Critic`.

    Args:
        true_logit: float tensor `[B, K]`.
        generated_logit: float tensor `[B, n, K]`.
        mask: float tensor `[B, n, K]`, 1 where a rollout counts.
        selection: one of `"first"`, `"all"`, `"closest"`, `"only_different"`.

    Returns:
        float32 scalar, 0 if nothing counts.

    Raises:
        ValueError: for an unknown `selection`.

    Example:
    >>> import numpy as np
    >>> logit = np.zeros((1, 1), "float32")
    >>> mask = np.ones((1, 1, 1), "float32")
    >>> round(float(critic_loss(logit + 3.0, logit[:, None] - 3.0, mask)), 3)
    -3.0
    """
    check_choice("selection", selection, SELECTIONS)
    mask = ops.convert_to_tensor(mask)
    true_logit = ops.broadcast_to(true_logit[:, None], generated_logit.shape)
    # What is masked may be NaN: compared, chosen and differentiated as 0.
    true_logit = only_where(mask, true_logit)
    generated_logit = only_where(mask, generated_logit)
    different = ops.cast(true_logit != generated_logit, "float32")
    generated_mask = true_mask = mask
    if selection == "first":
        first = ops.cast(ops.arange(mask.shape[1]) == 0, "float32")
        generated_mask = true_mask = mask * first[:, None]
    elif selection == "closest":
        # Rollouts that are the truth itself are no rivals.
        rivalry = generated_logit - 1000.0 * (1.0 - different) - 2000.0 * (1.0 - mask)
        closest = ops.argmax(ops.stop_gradient(rivalry), axis=1)
        chosen = ops.one_hot(closest, mask.shape[1], axis=1)
        generated_mask = true_mask = mask * chosen
    elif selection == "only_different":
        generated_mask = mask * different
    return masked_mean(ops.log_sigmoid(generated_logit), generated_mask) - masked_mean(
        ops.log_sigmoid(true_logit), true_mask
    )


def critic_accuracy(
    true_logit: Tensor, generated_logit: Tensor, mask: Tensor
) -> Tensor:
    """Share of windows, true and generated alike, on the right side of 0.

    Args:
        true_logit: float tensor `[B, K]`.
        generated_logit: float tensor `[B, n, K]`.
        mask: float tensor `[B, n, K]`.

    Returns:
        float32 scalar.
    """
    true_logit = ops.broadcast_to(true_logit[:, None], generated_logit.shape)
    right = ops.cast(true_logit > 0, "float32") + ops.cast(
        generated_logit <= 0, "float32"
    )
    return masked_mean(right / 2.0, mask)


def _optimizer(identifier: Any) -> keras.optimizers.Optimizer:
    """The Keras optimizer that is meant.

    Raises:
        TypeError: if it is neither an optimizer, a name nor a configuration.
        ValueError: for a name or configuration that Keras does not know.
    """
    known = isinstance(identifier, (str, keras.optimizers.Optimizer))
    if not known and not (isinstance(identifier, dict) and "class_name" in identifier):
        raise TypeError(
            "Expected `optimizer` to be a Keras optimizer, its name, or what "
            f"keras.saving.serialize_keras_object made of one. Received: optimizer="
            f"{identifier!r} (of type {type(identifier).__name__}). Pass for example "
            "keras.optimizers.AdamW(9e-6)."
        )
    try:
        return keras.optimizers.get(identifier)
    except (TypeError, ValueError) as error:
        # Keras' own words are about classes and modules.
        raise ValueError(
            "Expected `optimizer` to be one that Keras knows. Received: optimizer="
            f"{identifier!r}. Pass for example keras.optimizers.AdamW(9e-6), or "
            '"adamw".'
        ) from error


class CriticHead(keras.layers.Layer):
    """Linear head from features `[..., F, D]` to one logit `[...]`.

    Args:
        num_inputs: int, `F * D`.
        seed: int, decides the weights it starts with.
    """

    def __init__(self, num_inputs: int, seed: int) -> None:
        super().__init__(name="critic_head", dtype="float32")
        start = keras.initializers.GlorotUniform(seed)
        self.dense = keras.layers.Dense(
            1, kernel_initializer=start, name="logit", dtype="float32"
        )
        self.dense.build((None, num_inputs))
        self.built = True

    def call(self, features: Tensor) -> Tensor:
        """Logits of features."""
        *lead, count, width = features.shape
        return self.dense(ops.reshape(features, (*lead, count * width)))[..., 0]


class PolicyAndCriticOptimizer(keras.optimizers.Optimizer):
    """Two optimizers, each for its own variables.

    Args:
        policy_optimizer: Keras optimizer.
        critic_optimizer: Keras optimizer.
        critic_variables: list of Keras variables; all others are the policy's.
    """

    def __init__(
        self,
        policy_optimizer: keras.optimizers.Optimizer,
        critic_optimizer: keras.optimizers.Optimizer,
        critic_variables: Sequence[keras.Variable],
    ) -> None:
        super().__init__(learning_rate=0.0, name="policy_and_critic")
        self.policy_optimizer = policy_optimizer
        self.critic_optimizer = critic_optimizer
        self._critic_ids = {id(variable) for variable in critic_variables}

    @property
    def learning_rate(self) -> Any:
        """The policy's learning rate, as callbacks read and set it."""
        return self.policy_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.policy_optimizer.learning_rate = value

    @property
    def variables(self) -> list[keras.Variable]:
        """State of both optimizers."""
        return [
            *super().variables,
            *self.policy_optimizer.variables,
            *self.critic_optimizer.variables,
        ]

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Builds both optimizers on their variables."""
        super().build(variables)
        for optimizer, (_, own) in self._parts([None] * len(variables), variables):
            optimizer.build(own)

    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Applies each gradient with the optimizer of its variable."""
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        elif not self.built:
            self.build(trainable_variables)
        for optimizer, (own_grads, own) in self._parts(grads, trainable_variables):
            optimizer.apply(own_grads, own)
        self._iterations.assign_add(1)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Puts averaged weights in their places where an optimizer has `use_ema`."""
        for optimizer, (_, own) in self._parts([None] * len(var_list), var_list):
            optimizer.finalize_variable_values(own)

    def _parts(
        self, grads: Sequence[Tensor], variables: Sequence[keras.Variable]
    ) -> Iterator[tuple[keras.optimizers.Optimizer, tuple[list[Any], list[Any]]]]:
        parts: dict[bool, tuple[list[Any], list[Any]]] = {
            False: ([], []),
            True: ([], []),
        }
        for gradient, variable in zip(grads, variables):
            own_grads, own = parts[id(variable) in self._critic_ids]
            own_grads.append(gradient)
            own.append(variable)
        yield self.policy_optimizer, parts[False]
        yield self.critic_optimizer, parts[True]
