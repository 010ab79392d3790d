"""The authors' settings by name, each with what it is for.

From the configuration files of the authors' code for arXiv:2603.12248.
"""

import dataclasses
from typing import Any

import keras

from keras_ebft.features import FeatureNetwork
from keras_ebft.rewards import FeatureMatchingReward
from keras_ebft.samplers import BlockSampler
from keras_ebft.validation import check_int, check_number

# What their runs vary: cross-entropy weights (gamma) 0, .03 and .1, weights of the
# diversity 0, .5 and 1, and whitening on and off.
CE_WEIGHT = 0.03
LEARNING_RATE = 1e-6
WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings that belong together.

    Attributes:
        sampler: `BlockSampler`.
        feature_network: `FeatureNetwork`.
        reward: `FeatureMatchingReward`.
        ce_weight: float, weight of the cross-entropy (gamma).
        length: int, tokens per row. Their rows are one stream of documents with an
            end token after each, cut wherever it falls: `data.pack` makes them with
            `strategy="stream"`.
        batch_size: int, rows per update.
        passes: int, over the data, from a base model; from a supervised checkpoint
            they make one.
    """

    sampler: BlockSampler
    feature_network: FeatureNetwork
    reward: FeatureMatchingReward
    ce_weight: float
    length: int = 1024
    batch_size: int = 16
    passes: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `EBFTModel`, beside the model itself.

        Example:
        ```python
        recipe = keras_ebft.recipes.qa_code()
        model = keras_ebft.EBFTModel(causal_lm, **recipe.options)
        ```
        """
        return {
            "sampler": self.sampler,
            "feature_network": self.feature_network,
            "reward": self.reward,
            "advantage": "rloo",
            "ce_weight": self.ce_weight,
        }

    def optimizer(
        self, steps: int, learning_rate: float = LEARNING_RATE
    ) -> keras.optimizers.Optimizer:
        """AdamW (.9, .95), no decay, gradients clipped to a norm of 1.

        Args:
            steps: int, updates of the whole run: the rate rises over the first 3 %
                of them and then stays.
            learning_rate: float; 1e-6 is theirs, for all weights of 1 to 1.5 billion
                in batches of 16 rows. Adapters and small models want more.

        Returns:
            `keras.optimizers.AdamW`, not built.

        Raises:
            TypeError: for a value of the wrong type.
            ValueError: for a value out of range.
        """
        steps = check_int("steps", steps, 1)
        learning_rate = check_number("learning_rate", learning_rate, 0.0)
        schedule = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0,
            warmup_target=learning_rate,
            warmup_steps=max(round(WARMUP * steps), 1),
            decay_steps=steps,
            # No decay: it ends where it begins.
            alpha=1.0,
        )
        return keras.optimizers.AdamW(
            schedule, beta_1=0.9, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
        )


def qa_code(
    ce_weight: float = CE_WEIGHT,
    diversity_weight: float = 1.0,
    whitening: str | None = "rollout",
    base: keras.Model | None = None,
) -> Recipe:
    """Questions about code with answers, from Qwen2.5-1.5B.

    Their data are 100,000 questions and answers of at most 200 tokens. Blocks of 8
    tokens every 8 tokens; a window's feature is that of its last token.

    Args:
        ce_weight: float, their gamma: 0, .03 or .1.
        diversity_weight: float, theirs: 0, .5 or 1.
        whitening: `"rollout"` or `None` in their runs.
        base: `keras_hub.models.CausalLM` or `Backbone` that gives the features, for
            a run that starts from a supervised checkpoint: the model before it.

    Returns:
        `Recipe`.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    ```python
    recipe = keras_ebft.recipes.qa_code(ce_weight=0.1)
    model = keras_ebft.EBFTModel(causal_lm, **recipe.options)
    rows = keras_ebft.data.pack(pairs, tokenizer, length=recipe.length).load()
    steps = recipe.passes * len(rows) // recipe.batch_size
    model.compile(recipe.optimizer(steps))
    model.fit(rows.arrays, batch_size=recipe.batch_size, epochs=recipe.passes)
    ```
    """
    sampler = BlockSampler(
        rollout_length=8, stride=8, context_length=8, num_samples=4, temperature=0.6
    )
    return _recipe(sampler, "last_token", ce_weight, diversity_weight, whitening, base)


def unstructured_code(
    ce_weight: float = CE_WEIGHT,
    diversity_weight: float = 1.0,
    whitening: str | None = "rollout",
    base: keras.Model | None = None,
) -> Recipe:
    """Plain source code, 20 million tokens of it, from Qwen2.5-1.5B.

    Arguments, result and errors are those of `qa_code`; so are the settings.
    """
    return qa_code(ce_weight, diversity_weight, whitening, base)


def translation(
    ce_weight: float = CE_WEIGHT,
    diversity_weight: float = 1.0,
    whitening: str | None = "rollout",
    base: keras.Model | None = None,
) -> Recipe:
    """Translation, from Llama 3.2 1B, trained on ALMA's pairs.

    Shorter blocks, closer together, and a window's feature is the mean over its
    tokens. Arguments, result and errors are those of `qa_code`.
    """
    sampler = BlockSampler(
        rollout_length=4, stride=2, context_length=4, num_samples=4, temperature=0.6
    )
    return _recipe(sampler, "mean", ce_weight, diversity_weight, whitening, base)


def _recipe(
    sampler: BlockSampler,
    pooling: str,
    ce_weight: float,
    diversity_weight: float,
    whitening: str | None,
    base: keras.Model | None,
) -> Recipe:
    return Recipe(
        sampler=sampler,
        feature_network=FeatureNetwork(
            layers=(0.25, 0.5, 0.75),
            mode="concat",
            pooling=pooling,
            network=getattr(base, "backbone", base),
        ),
        reward=FeatureMatchingReward(
            diversity_weight=diversity_weight, whitening=whitening, normalize="token"
        ),
        ce_weight=check_number("ce_weight", ce_weight, 0.0),
    )
