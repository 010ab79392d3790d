"""What the examples ask about training on their command lines, and make of it."""

from pathlib import Path

import keras

import keras_ebft


def add_training_arguments(parser, **defaults):
    """Rows, steps and where results go; `defaults` are those of the example."""
    group = parser.add_argument_group("training")
    group.add_argument("--length", type=int, help="tokens per row")
    group.add_argument("--batch-size", type=int, help="rows per step")
    group.add_argument("--steps", type=int)
    group.add_argument("--learning-rate", type=float, default=1e-3)
    group.add_argument("--ce-weight", type=float, default=0.1)
    group.add_argument("--held-out-rows", type=int, help="to measure on")
    group.add_argument("--held-out-samples", type=int, default=4, help="per block")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--output", type=Path, default=Path("outputs"))
    parser.set_defaults(**defaults)


def add_method_arguments(parser, **defaults):
    """What of rollouts is compared with the truth."""
    group = parser.add_argument_group("method")
    group.add_argument("--temperature", type=float, default=0.6)
    group.add_argument(
        "--whitening", choices=("rollout", "feature", "none"), default="rollout"
    )
    group.add_argument(
        "--pooling", choices=("last_token", "mean", "concat"), default="last_token"
    )
    parser.set_defaults(**defaults)


def add_data_arguments(parser, **defaults):
    """Which data set, and which parts of it."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset")
    group.add_argument("--config", help="configuration of the data set")
    group.add_argument("--split", default="train")
    group.add_argument("--held-out-split", default="validation")
    parser.set_defaults(**defaults)


def build_model(causal_lm, sampler, arguments):
    """The model that `fit` trains, or that measures with another sampler."""
    whitening = None if arguments.whitening == "none" else arguments.whitening
    return keras_ebft.EBFTModel(
        causal_lm,
        sampler,
        feature_network=keras_ebft.FeatureNetwork(pooling=arguments.pooling),
        reward=keras_ebft.FeatureMatchingReward(whitening=whitening),
        ce_weight=arguments.ce_weight,
        seed=arguments.seed,
    )


def make_optimizer(learning_rate, steps):
    """The paper's AdamW; falling to 0, so that the last steps' noise is not kept."""
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    return keras.optimizers.AdamW(
        schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0
    )
