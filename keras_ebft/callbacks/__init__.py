"""Keras callbacks: measuring a model and reading what it writes while it trains."""

from keras_ebft.callbacks.completions import Completions
from keras_ebft.callbacks.measure import Measure
from keras_ebft.callbacks.throughput import Throughput

__all__ = ["Completions", "Measure", "Throughput"]
