"""The stages of a step one by one, for people who look inside."""

from keras_ebft.inspection.stages import Inspection, compile_stages

__all__ = ["Inspection", "compile_stages"]
