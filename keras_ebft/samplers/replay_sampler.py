"""Rollouts that are given instead of sampled."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ebft.backend.replicas import own_rows
from keras_ebft.layout.blocks import Blocks
from keras_ebft.networks import OutputHead, RoutedNetwork, RowNetwork
from keras_ebft.networks.prefix_cache import DocumentState
from keras_ebft.samplers.block_sampler import BlockSampler
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_id_range, check_integers


@keras.saving.register_keras_serializable("keras_ebft")
class ReplaySampler(BlockSampler):
    """Returns given rollouts instead of sampling.

    A `fit` step becomes deterministic, and comparable with other programs.

    Args:
        token_ids: int array `[B, n, K, G]`; every batch must have B documents
            with K blocks.
        **geometry: further arguments of `BlockSampler`. `rollout_length` and
            `num_samples` follow from `token_ids`.

    Raises:
        TypeError: if `token_ids` are not integers.
        ValueError: if `token_ids` has not four axes or ids below 0 or beyond what an
            int32 holds; from `EBFTModel`, if they are outside its vocabulary; when
            called, if they do not fit the batch.

    Example:
    >>> import numpy as np
    >>> sampler = ReplaySampler(np.zeros((1, 2, 3, 4), dtype="int32"), stride=4)
    >>> sampler.num_samples, sampler.rollout_length
    (2, 4)
    """

    def __init__(self, token_ids: Any, **geometry: Any) -> None:
        try:
            token_ids = np.asarray(token_ids)
        except ValueError as error:
            raise ValueError(
                "Expected `token_ids` of shape [B, n, K, G]. Received: lists of "
                "unequal lengths. Pad them to one rollout length."
            ) from error
        check_integers("token_ids", token_ids)
        check_id_range(token_ids)
        if token_ids.ndim != 4:
            raise ValueError(
                "Expected `token_ids` of shape [B, n, K, G] (documents, samples, "
                f"blocks, tokens). Received: shape {token_ids.shape}."
            )
        geometry.setdefault("rollout_length", token_ids.shape[3])
        geometry.setdefault("num_samples", token_ids.shape[1])
        super().__init__(**geometry)
        given = (self.num_samples, self.rollout_length)
        if given != (token_ids.shape[1], token_ids.shape[3]):
            raise ValueError(
                "Expected `num_samples` and `rollout_length` to be those of "
                f"`token_ids`, {token_ids.shape[1]} and {token_ids.shape[3]}. "
                f"Received: {given[0]} and {given[1]}. Leave them out."
            )
        self.token_ids = token_ids.astype("int32")

    def check_vocabulary(self, size: int) -> None:
        """Raises if tokens are outside a vocabulary; see `BlockSampler`."""
        super().check_vocabulary(size)
        check_id_range(self.token_ids, size)

    @property
    def draws_tokens(self) -> bool:
        """False: they are given, for all samples together."""
        return False

    def __call__(
        self,
        policy: RoutedNetwork | RowNetwork,
        head: OutputHead,
        document: DocumentState,
        blocks: Blocks,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The given rollouts; see `BlockSampler.__call__`."""
        token_ids = own_rows(ops.convert_to_tensor(self.token_ids), uniform.shape[0])
        if tuple(uniform.shape) != tuple(token_ids.shape):
            raise ValueError(
                "Expected rollouts for the batch, of shape [B, n, K, G] = "
                f"{tuple(uniform.shape)}. Received: token_ids of shape "
                f"{self.token_ids.shape}. Replay them on the documents, batch size "
                "and geometry they were made with."
            )
        return token_ids, None

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {"token_ids": self.token_ids.tolist(), **super().get_config()}

    def _shown_settings(self) -> dict[str, Any]:
        return {"token_ids": self.token_ids, **super().get_config()}
