"""Settings under which a term of the method does nothing, or works against another.

They are allowed, and said once through the logger `keras_ebft` when a model is built:
as warnings, or as information where the paper's own settings are meant.
`tests/test_notices.py` shows each of them in numbers.
"""

import logging
import weakref

from keras_ebft.features.feature_network import LAYERED_MODES
from keras_ebft.networks import RoutedNetwork, adapters, num_layers
from keras_ebft.rewards import FeatureMatchingReward, RewardSum
from keras_ebft.validation import is_zero

logger = logging.getLogger("keras_ebft")

# What has been said, by language model: measuring builds further models on it.
_said = weakref.WeakKeyDictionary()
# By language model the counts of steps and the frozen networks of all its models.
_earlier = weakref.WeakKeyDictionary()


def say_notices(model):
    """Logs what is to be said of a model's settings, each once per `CausalLM`.

    Args:
        model: `EBFTModel`.
    """
    said = _said.setdefault(model.causal_lm, set())
    for level, text in notices(model):
        if text not in said:
            said.add(text)
            logger.log(level, text)


def note_frozen_copies(model, training_steps):
    """Logs a warning if a model froze copies of weights that were trained before.

    Args:
        model: `EBFTModel` that was just made.
        training_steps: variable that counts its steps.
    """
    earlier = _earlier.setdefault(model.causal_lm, [])
    known = {id(reference()) for _, own in earlier for reference in own}
    new = [n for n in model.frozen_networks if id(n) not in known]
    if _copies_policy(model, new) and any(int(steps.numpy()) for steps, _ in earlier):
        logger.warning(
            "This EBFTModel is made of a language model that was trained before. Its "
            "frozen copy, which features and the reference of the divergence come "
            "from, is the tuned model, not the one before training. To go on training, "
            "use the EBFTModel that is there, or one that was saved; to keep the "
            "features of the model before, pass FeatureNetwork(network=base)."
        )
    earlier.append((training_steps, [weakref.ref(n) for n in model.frozen_networks]))


def _copies_policy(model, new):
    """Whether any of the new frozen networks holds the policy's weights of now."""
    if not new or adapters.adapted_layers(model.causal_lm.backbone):
        # The base beneath adapters is as it was.
        return False
    own = model.feature_network.network is None and model.reward.needs_features
    return own or model.objective.needs_reference


def notices(model):
    """What is to be said of a model's settings.

    Args:
        model: `EBFTModel`.

    Returns:
        list of `(logging level, text)`.
    """
    if not model.objective.needs_rollouts:
        return []
    found = [*_of_sampling(model.sampler, model.advantage), *_of_divergence(model)]
    matching = _matching_rewards(model.reward)
    if model.reward.needs_features:
        found += _of_layers(model)
    for reward in matching:
        found += _of_diversity(reward, model)
        found += _of_lengths(reward, model.feature_network)
        found += _of_single_rollouts(reward, model.sampler.num_samples)
    return found


def _matching_rewards(reward):
    if isinstance(reward, RewardSum):
        return [part for r in reward.rewards for part in _matching_rewards(r)]
    return [reward] if isinstance(reward, FeatureMatchingReward) else []


def _of_sampling(sampler, advantage):
    if sampler.draws_tokens and (sampler.temperature == 0 or sampler.top_k == 1):
        setting = f"temperature={sampler.temperature:g}, top_k={sampler.top_k}"
        if sampler.num_samples > 1 and advantage != "reinforce":
            outcome = "is 0: the policy loss has no gradient"
            if advantage == "rloo" and sampler.num_samples == 2:
                outcome = "is minus the diversity and pushes them all down"
            yield (
                logging.WARNING,
                f"With {setting} the {sampler.num_samples} rollouts of a block are the "
                f'same, and their advantage with advantage="{advantage}" {outcome}. '
                "Sample at a temperature above 0.",
            )
    unused = []
    if sampler.anchors != "stride" and sampler.stride != 8:
        unused.append(f"stride={sampler.stride}")
    if sampler.anchors == "answer_start" and sampler.context_length != 8:
        unused.append(f"context_length={sampler.context_length}")
    if unused:
        yield (
            logging.WARNING,
            f'With anchors="{sampler.anchors}" {" and ".join(unused)} changes nothing.',
        )


def _of_divergence(model):
    objective = model.objective
    if is_zero(objective.weights["kl_weight"]):
        return
    if adapters.are_trained(model.causal_lm.backbone):
        yield (
            logging.WARNING,
            "The adapters are trained already, and the reference of the divergence is "
            "the base without them: `kl` does not begin at 0, and its gradient leads "
            "back to the base. To begin from the model as it is, merge the adapters "
            "first: causal_lm.save_weights(path), then causal_lm.load_weights(path).",
        )
    if objective.kl_estimator == "k1" and not objective.repeats_updates:
        yield (
            logging.WARNING,
            'With kl_estimator="k1" and one update per rollout the divergence is '
            "measured right, but its gradient is 0 on average, whatever kl_weight is: "
            'noise that keeps the policy nowhere. Use kl_estimator="k2".',
        )


def _of_layers(model):
    features, network = model.feature_network, model.feature_reader.network
    if features.mode not in LAYERED_MODES or not isinstance(network, RoutedNetwork):
        return
    depth = num_layers(features.network or model.causal_lm.backbone)
    tapped = features.tapped_layers(depth)
    if len(tapped) < len(features.layers):
        yield (
            logging.WARNING,
            f"The taps layers={features.layers} fall together on a network of {depth} "
            f"layers: features come from layer {_listed(tapped)} alone. Name other "
            "layers if that is not what you mean.",
        )


def _of_diversity(reward, model):
    samples, weight = model.sampler.num_samples, reward.diversity_weight
    if not weight or samples == 1:
        return
    if samples == 2 and model.advantage == "group_norm":
        yield (
            logging.WARNING,
            'With num_samples=2 and advantage="group_norm" the diversity has no '
            "effect: it is the same for both rollouts. Use more samples, or "
            'advantage="rloo".',
        )
    network = model.feature_reader.network
    if reward.whitening is None or not isinstance(network, RoutedNetwork):
        return
    width = network.model.outputs[0].shape[-1]
    if samples > width:
        return
    text = (
        f'With whitening="{reward.whitening}" the features of {samples} rollouts in '
        f"{width} dimensions or more are orthogonal whenever no two are the same: "
        "diversity is then 0, and nothing but a penalty on duplicates."
    )
    if reward.alignment_weight:
        yield logging.INFO, text
    else:
        yield (
            logging.WARNING,
            text
            + " With alignment_weight=0 there is nothing else. Use whitening=None.",
        )


def _of_lengths(reward, features):
    several = features.mode in ("stack", "middle_stack")
    pooled = features.pooling in ("concat", "mean")
    if reward.normalizes_pooled:
        return
    if reward.whitening == "rollout" and features.pooling == "mean":
        yield (
            logging.INFO,
            'With whitening="rollout" and pooling="mean" features have unequal '
            "lengths, and a rollout that is longer than its siblings can have the sign "
            'of its alignment turned round. normalize="pooled" prevents that.',
        )
    raw = reward.whitening is None
    if raw and reward.diversity_weight and (several or pooled):
        yield (
            logging.WARNING,
            'With whitening=None and normalize="token" the alignment is a cosine, but '
            f'the diversity with pooling="{features.pooling}", mode="{features.mode}" '
            "a product of vectors whose length is not 1: the two are weighed against "
            "each other by the number of tokens and features. Use "
            'normalize="auto", or another diversity_weight.',
        )


def _of_single_rollouts(reward, samples):
    if samples == 1 and reward.whitening == "feature":
        yield (
            logging.WARNING,
            'With num_samples=1 and whitening="feature" every alignment is 2 or -2: '
            "one rollout spans one dimension. Use whitening=None.",
        )
    if samples == 1 and reward.whitening == "rollout":
        yield (
            logging.INFO,
            'With num_samples=1 whitening="rollout" changes no alignment.',
        )


def _listed(layers):
    *most, last = [str(layer) for layer in layers]
    return f"{', '.join(most)} and {last}" if most else last
