"""Feature matching on held-out documents, at several rollout lengths."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import keras_hub

from keras_ebft.configurable import Shown
from keras_ebft.evaluation.models import causal_lm_of
from keras_ebft.features import FeatureNetwork
from keras_ebft.model import EBFTModel
from keras_ebft.networks.frozen_reader import FrozenReader
from keras_ebft.rewards import FeatureMatchingReward, Reward
from keras_ebft.samplers import BlockSampler
from keras_ebft.training.metrics import DOCUMENT_MEASURES
from keras_ebft.validation import check_int

LOSS = "feature_matching_loss"
MEASURES = (
    LOSS,
    "alignment",
    "diversity",
    "best_alignment",
)


class FeatureMatching(Shown):
    """Feature-matching loss, alignment and diversity against rollout length.

    Made before training, because the frozen network that measures is a copy of
    the model as it is then (and stays so where training moves the model's own:
    `ema_decay`, a critic); called whenever a value is wanted. Values of any two
    models of one family compare if the same object measured them, or if both were
    made from the same weights.

    Args:
        model: `EBFTModel`, whose frozen network, sampler and, where it measures
            feature matching, reward are used; or a
            `keras_hub.models.CausalLM`. Where there is no frozen network (a
            `CausalLM`, supervised fine-tuning), a copy is made now.
        rollout_lengths: tuple of ints, tokens per rollout.
        num_samples: int, rollouts per block; by default the sampler's. More of them
            make the values less noisy.
        seed: int, decides the rollouts, the same in every call.

    Raises:
        TypeError: for another kind of model, or lengths that are no tuple of ints.
        ValueError: if there is no length, or one is below 1.

    Example:
    ```python
    measure = keras_ebft.evaluation.FeatureMatching(model, rollout_lengths=(2, 8, 32))
    measure(held_out)["feature_matching_loss@8"]
    ```
    """

    def __init__(
        self,
        model: EBFTModel | keras_hub.models.CausalLM,
        rollout_lengths: Sequence[int] = (8,),
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(rollout_lengths, (list, tuple)):
            raise TypeError(
                "Expected `rollout_lengths` to be a tuple of ints. Received: "
                f"rollout_lengths={rollout_lengths!r} (of type "
                f"{type(rollout_lengths).__name__}). Pass for example (8,)."
            )
        if not rollout_lengths:
            raise ValueError(
                "Expected at least one of `rollout_lengths`. Received: "
                f"{rollout_lengths!r}. Pass for example (8,)."
            )
        network, reward, sampler = _parts(model)
        num_samples = sampler.num_samples if num_samples is None else num_samples
        reward = _measuring(reward, check_int("num_samples", num_samples, 1))
        self._models: dict[int, EBFTModel] = {}
        for length in rollout_lengths:
            config = {
                **sampler.get_config(),
                "rollout_length": check_int("rollout_lengths", length, 1),
                "num_samples": num_samples,
            }
            measuring = _on_weights_of(model, config, network, reward, seed)
            if not self._models:
                # One frozen network serves all lengths.
                network = _ReadBy(network, cast(FrozenReader, measuring.feature_reader))
            self._models[length] = measuring

    def _shown_settings(self) -> dict[str, Any]:
        models = list(self._models.values())
        return {
            "rollout_lengths": tuple(self._models),
            "num_samples": models[0].sampler.num_samples,
            "seed": models[0].seed,
        }

    def __call__(self, x: Any, batch_size: int | None = None) -> dict[str, float]:
        """Measures the model as it is now.

        Args:
            x: documents of any form `EBFTModel.evaluate` accepts; long enough for
                a block of the greatest rollout length.
            batch_size: int, documents per step, for data in memory.

        Returns:
            dict of floats for every length G: `feature_matching_loss@G`, which
            contains the variance of a mean of n rollouts;
            `unbiased_feature_matching_loss@G`, which does not (for 2 rollouts or
            more); with whitening `whitened_feature_matching_loss@G`;
            `alignment@G`, `diversity@G` and `best_alignment@G` (of the best of the
            n rollouts). And `ce_loss`, `perplexity` of the documents, read anyway.

        Raises:
            ValueError: for documents that cannot be used.
        """
        measured: dict[str, float] = {}
        for length, model in self._models.items():
            values = model.evaluate(
                x, batch_size=batch_size, return_dict=True, verbose=0
            )
            names = dict.fromkeys((*MEASURES, *model.reward.block_measures))
            measured |= {f"{name}@{length}": float(values[name]) for name in names}
        return measured | {name: float(values[name]) for name in DOCUMENT_MEASURES}


def measuring_model(
    model: EBFTModel | keras_hub.models.CausalLM, num_samples: int, seed: int
) -> EBFTModel:
    """A model on the same weights that only measures, with a still feature network.

    Args:
        model: `EBFTModel` or `keras_hub.models.CausalLM`, as for `FeatureMatching`.
        num_samples: int, rollouts per block.
        seed: int.

    Returns:
        `EBFTModel`.
    """
    network, reward, sampler = _parts(model)
    config = {**sampler.get_config(), "num_samples": num_samples}
    return _on_weights_of(model, config, network, reward, seed)


def _on_weights_of(
    model: EBFTModel | keras_hub.models.CausalLM,
    sampler_config: dict[str, Any],
    network: FeatureNetwork,
    reward: Reward,
    seed: int,
) -> EBFTModel:
    sampler = BlockSampler.from_config(sampler_config)
    measuring = EBFTModel(causal_lm_of(model), sampler, network, reward, seed=seed)
    measuring.compile(jit_compile=jit_compile_of(model))
    return measuring


def _measuring(reward: Reward, num_samples: int) -> Reward:
    """The reward, with the unbiased estimate of the loss where there is one."""
    if isinstance(reward, FeatureMatchingReward) and num_samples > 1:
        reward = copy.copy(reward)
        reward.measures_unbiased = True
    return reward


def _parts(
    model: EBFTModel | keras_hub.models.CausalLM,
) -> tuple[FeatureNetwork, Reward, BlockSampler]:
    """What measures: feature network, reward, sampler."""
    if not isinstance(model, EBFTModel):
        return FeatureNetwork(), FeatureMatchingReward(), BlockSampler()
    network, reader = model.feature_network, model.feature_reader
    if reader is not None:
        network = _ReadBy(network, _still(model, reader))
    measures = LOSS in model.reward.block_measures
    own = type(model.sampler) is BlockSampler
    return (
        network,
        model.reward if measures else FeatureMatchingReward(),
        model.sampler if own else BlockSampler(),
    )


def _still(model: EBFTModel, reader: FrozenReader) -> FrozenReader:
    """A reader of the model's feature network that no training moves."""
    learns = model.critic is not None and model.critic.train_features
    if not (learns or model.feature_network.is_live):
        return reader
    copy = model.feature_network.freeze(model.causal_lm.backbone)
    own = reader.network.model.variables
    for variable, value in zip(copy.network.model.variables, own, strict=True):
        # By way of NumPy: `assign` may share a buffer, which JAX then donates.
        variable.assign(value.numpy())
    return copy


def jit_compile_of(model: EBFTModel | keras_hub.models.CausalLM) -> bool | str:
    """As the model is compiled, so that both round alike and draw the same tokens."""
    compiled = isinstance(model, EBFTModel) and model.compiled
    return model.jit_compile if compiled else "auto"


class _ReadBy(FeatureNetwork):
    """A feature network whose frozen reader is there already."""

    def __init__(self, network: FeatureNetwork, reader: FrozenReader) -> None:
        # Everything as in `network`, the user's own hidden states included.
        self.__dict__.update(vars(network))
        self.ema_decay = None
        self._reader = FrozenReader(reader.network, reader.tap_slots)

    def freeze(
        self, backbone: keras_hub.models.Backbone, with_reference: bool = False
    ) -> FrozenReader:
        """The reader that is there, of features alone."""
        return self._reader
