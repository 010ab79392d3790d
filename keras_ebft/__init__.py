"""Energy-Based Fine-Tuning of KerasHub language models through `model.fit()`."""

from keras_ebft import (
    callbacks,
    data,
    distribution,
    estimates,
    evaluation,
    functional,
    models,
    plots,
    recipes,
)
from keras_ebft.export import export_to_hugging_face
from keras_ebft.features import FeatureNetwork
from keras_ebft.layout.geometry import BlockGeometry
from keras_ebft.model import EBFTModel
from keras_ebft.objectives.critic import Critic
from keras_ebft.reports import report
from keras_ebft.rewards import (
    CharacteristicFunctionReward,
    FeatureMatchingReward,
    Reward,
    RewardSum,
    VerifierReward,
)
from keras_ebft.samplers import BlockSampler, ReplaySampler
from keras_ebft.training.checkpoints import TrainingCheckpoint
from keras_ebft.training.compilation_cache import use_compilation_cache
from keras_ebft.version import __version__

__all__ = [
    "BlockGeometry",
    "BlockSampler",
    "CharacteristicFunctionReward",
    "Critic",
    "EBFTModel",
    "FeatureMatchingReward",
    "FeatureNetwork",
    "ReplaySampler",
    "Reward",
    "RewardSum",
    "TrainingCheckpoint",
    "VerifierReward",
    "__version__",
    "callbacks",
    "data",
    "distribution",
    "estimates",
    "evaluation",
    "export_to_hugging_face",
    "functional",
    "models",
    "plots",
    "recipes",
    "report",
    "use_compilation_cache",
]
