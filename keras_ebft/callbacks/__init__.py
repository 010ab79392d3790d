"""Keras callbacks: measuring while a model trains."""

from keras_ebft.callbacks.measure import Measure

__all__ = ["Measure"]
