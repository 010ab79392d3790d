"""The settings of features and reward that an audit compares."""

from typing import NamedTuple

from keras_ebft.features import FeatureNetwork
from keras_ebft.features.feature_network import LAYERED_MODES, MODES
from keras_ebft.functional.inner_products import WHITENINGS
from keras_ebft.functional.pooling import POOLINGS
from keras_ebft.rewards import FeatureMatchingReward
from keras_ebft.validation import check_choice


class Candidate(NamedTuple):
    """One setting: what features are, and how they are rewarded.

    Attributes:
        features: `FeatureNetwork`.
        reward: `FeatureMatchingReward`.
        tapped: tuple of ints, the layers that are read, from 1; empty of a callable
            network.
        own: bool, whether it is what the audited model has.
    """

    features: FeatureNetwork
    reward: FeatureMatchingReward
    tapped: tuple
    own: bool = False

    @property
    def settings(self):
        """What tells it apart, a dict that JSON can hold."""
        layered = self.tapped and self.features.mode in LAYERED_MODES
        return {
            "layers": list(self.features.layers) if layered else None,
            "tapped": list(self.tapped),
            "mode": self.features.mode if self.tapped else "callable",
            "pooling": self.features.pooling,
            "whitening": self.reward.whitening,
            "normalize": self.reward.normalize,
        }

    @property
    def key(self):
        """The same for settings that mean the same."""
        one = len(self.tapped) == 1 and self.features.mode in LAYERED_MODES
        mode = "one" if one else self.features.mode
        pooled = self.reward.normalizes_pooled
        pooling, whitening = self.features.pooling, self.reward.whitening
        return (self.tapped, mode, pooling, whitening, pooled)


def make_candidates(layers, modes, poolings, whitenings, own, depth):
    """Every combination, each once.

    Args:
        layers: list of what `FeatureNetwork` takes as `layers`, for the modes that
            take any.
        modes: list of modes.
        poolings: list of poolings.
        whitenings: list of whitenings.
        own: `(FeatureNetwork, FeatureMatchingReward or None)` of the audited model;
            the network and the weights of the reward are the candidates' too.
        depth: int, layers of the network; `None` of a callable one.

    Returns:
        list of `Candidate`, the model's own first.

    Raises:
        ValueError: for an unknown name or a layer that is not there.
    """
    network, reward = own
    found = {}

    def add(features, reward, own=False):
        tapped = () if depth is None else tuple(features.tapped_layers(depth))
        candidate = Candidate(features, reward, tapped, own)
        found.setdefault(candidate.key, candidate)

    if reward is not None:
        add(network, reward, own=True)
    shapes = [{}] if depth is None else list(_shapes(layers, modes))
    for shape in shapes:
        for pooling in poolings:
            for whitening in whitenings:
                features = FeatureNetwork(
                    **shape, pooling=pooling, network=network.network
                )
                add(features, _weighed_as(reward, whitening))
    return list(found.values())


def _shapes(layers, modes):
    for mode in modes:
        if mode in LAYERED_MODES:
            yield from ({"mode": mode, "layers": taps} for taps in layers)
        else:
            yield {"mode": mode}


def _weighed_as(reward, whitening):
    if reward is None:
        return FeatureMatchingReward(whitening=whitening)
    return FeatureMatchingReward(
        reward.alignment_weight, reward.diversity_weight, whitening, reward.normalize
    )


def check_lists(layers, modes, poolings, whitenings):
    """Raises unless each is a list of what there is.

    Raises:
        TypeError: for something else than a list.
        ValueError: for an empty list or an unknown name.
    """
    given = {
        "layers": (layers, None),
        "modes": (modes, MODES),
        "poolings": (poolings, POOLINGS),
        "whitenings": (whitenings, WHITENINGS),
    }
    for name, (values, choices) in given.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"Expected `{name}` to be a list of settings to compare. Received: "
                f"{name}={values!r} (of type {type(values).__name__}). Pass a list, "
                f"for example {name}=[{values!r}]."
            )
        if not values:
            raise ValueError(
                f"Expected at least one of `{name}`. Received: {values!r}. Leave it "
                "out for the default."
            )
        for value in values if choices else ():
            check_choice(name, value, choices)
    for taps in layers:
        if not isinstance(taps, (list, tuple)):
            raise TypeError(
                "Expected each of `layers` to be a tuple of layers that are tapped "
                f"together. Received: {taps!r} in layers={layers!r}. Pass for example "
                "layers=[(0.25, 0.5, 0.75), (0.5,)]."
            )
