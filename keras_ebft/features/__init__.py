"""Features: what of a text is matched."""

from keras_ebft.features.feature_network import FeatureNetwork

__all__ = ["FeatureNetwork"]
