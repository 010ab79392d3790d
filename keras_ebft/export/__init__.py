"""Trained models for other libraries."""

from keras_ebft.export.hugging_face import export_to_hugging_face

__all__ = ["export_to_hugging_face"]
