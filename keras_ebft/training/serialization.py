"""How `EBFTModel` is written to a file and read from it."""

import keras

from keras_ebft.backend.replicas import own_path
from keras_ebft.backend.updates import check_finite
from keras_ebft.networks import adapters
from keras_ebft.objectives.objective import WEIGHTS
from keras_ebft.training.frozen_weights import freeze_weights, frozen_weights


class Serialization(keras.Model):
    """Configuration and state of an `EBFTModel`, as Keras' saving asks for them."""

    def save(self, filepath, *args, **kwargs):
        """Saves the whole model, as `keras.Model.save` does.

        Of several processes the first writes, and the others go on.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written.
        """
        with own_path(filepath) as path:
            if path is not None:
                check_finite(self.written_variables(), filepath)
                super().save(path, *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        """Saves the weights, as `keras.Model.save_weights` does.

        Of several processes the first writes, and the others go on.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written.
        """
        with own_path(filepath) as path:
            if path is not None:
                check_finite(self.written_variables(), filepath)
                super().save_weights(path, *args, **kwargs)

    def written_variables(self):
        """Weights and the optimizer's variables, a list of `keras.Variable`."""
        metrics = {id(variable) for variable in self.metrics_variables}
        own = [variable for variable in self.variables if id(variable) not in metrics]
        return [*own, *(self.optimizer.variables if self.compiled else ())]

    def _saved_variables(self):
        """What Keras does not save, or not apart from other weights."""
        return {
            "training_seed": self._training_seed.state,
            "evaluation_seed": self._evaluation_seed.state,
            "inspection_seed": self._inspection_seed.state,
            **adapters.exact_variables(self.causal_lm.backbone),
        }

    def get_config(self):
        """The constructor's arguments, parts serialized as Keras does.

        `adapters` and `frozen` are for `from_config` alone: the configuration of a
        KerasHub backbone leaves out that it has some.
        """
        causal_lm = keras.saving.serialize_keras_object(self.causal_lm)
        # Compiled for `generate` only; KerasHub compiles it again when it is built.
        causal_lm.pop("compile_config", None)
        return {
            **super().get_config(),
            "causal_lm": causal_lm,
            "adapters": adapters.adapter_config(self.causal_lm.backbone),
            "frozen": frozen_weights(self.causal_lm),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
            "feature_network": keras.saving.serialize_keras_object(
                self.feature_network
            ),
            "reward": keras.saving.serialize_keras_object(self.reward),
            "advantage": self.advantage,
            **self.objective.get_config(),
            "critic": keras.saving.serialize_keras_object(self.critic)
            if self.critic
            else None,
            "rematerialize": self.rematerialize,
            "micro_batches": self.micro_batches,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Builds the model from what `get_config` returned."""
        parts = (
            "causal_lm",
            "sampler",
            "feature_network",
            "reward",
            "critic",
            *WEIGHTS,
        )
        config = {
            name: keras.saving.deserialize_keras_object(value)
            if name in parts and isinstance(value, dict)
            else value
            for name, value in config.items()
        }
        enabled = config.pop("adapters", None)
        adapters.enable_adapters(config["causal_lm"].backbone, enabled)
        # Files of earlier versions do not say.
        freeze_weights(config["causal_lm"], config.pop("frozen", None) or [])
        return cls(**config)
