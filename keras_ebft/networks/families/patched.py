"""Attention reached by patching a decoder layer for the length of its call."""

from collections.abc import Callable
from typing import NamedTuple

from keras_ebft.networks.patches import patched


class PatchedAttention(NamedTuple):
    """Attention by patches; see `Family.attention`.

    Attributes:
        patches: function `(decoder, attend, positions)` that returns a list of `Patch`.
    """

    patches: Callable

    route = "patched"

    def __call__(self, decoder, attend, positions):
        """Context in which the attention of a decoder layer calls `attend`."""
        return patched(self.patches(decoder, attend, positions))
