"""Rollouts: every block of every document and sample, advanced together."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_ebft.configurable import Configurable
from keras_ebft.geometry import BlockGeometry
from keras_ebft.kernels import linear_sample
from keras_ebft.prefix_cache import block_decoder
from keras_ebft.validation import check_int, check_number


class Rollouts(NamedTuple):
    """Generated tokens and their log-probabilities.

    Attributes:
        token_ids: int32 tensor `[B, n, K, G]`.
        log_prob: float32 tensor `[B, n, K, G]` at the sampling temperature, in
            nats; `None` where the tokens were given.
    """

    token_ids: Any
    log_prob: Any


@keras.saving.register_keras_serializable("keras_ebft")
class BlockSampler(Configurable):
    """Strided block-parallel sampling.

    Every `stride` tokens of a document a block starts, sees the document up to
    its anchor and generates `rollout_length` tokens, `num_samples` times
    independently. All blocks of all samples generate one token per step, so a
    step costs one forward pass of `B * n * K` tokens against the shared keys and
    values of the documents (arXiv:2603.12248; defaults are the paper's for code).

    Args:
        rollout_length: int, generated tokens per block (G).
        stride: int, document tokens between anchors.
        context_length: int, document tokens seen by the first block.
        num_samples: int, independent rollouts per block (n).
        temperature: float above 0; tokens are drawn from
            `softmax(logits / temperature)`, which is also the distribution that
            the policy gradient trains.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    >>> sampler = BlockSampler(rollout_length=4, stride=2, num_samples=2)
    >>> sampler.geometry(length=32).num_blocks
    11
    """

    def __init__(
        self,
        rollout_length=8,
        stride=8,
        context_length=8,
        num_samples=4,
        temperature=0.6,
    ):
        self.rollout_length = check_int("rollout_length", rollout_length, 1)
        self.stride = check_int("stride", stride, 1)
        self.context_length = check_int("context_length", context_length, 1)
        self.num_samples = check_int("num_samples", num_samples, 1)
        self.temperature = check_number("temperature", temperature, 0.0, exclusive=True)

    def geometry(self, length):
        """`BlockGeometry` of documents of `length` tokens."""
        return BlockGeometry(
            length, self.context_length, self.rollout_length, self.stride
        )

    def __call__(self, policy, head, document, geometry, uniform):
        """Samples rollouts.

        Args:
            policy: `RoutedNetwork` that read the documents.
            head: `OutputHead`.
            document: `DocumentState` without gradient.
            geometry: `BlockGeometry`.
            uniform: float32 tensor `[B, n, K, G]` in [0, 1); each number decides
                one token.

        Returns:
            `Rollouts`.
        """
        shape = tuple(uniform.shape)

        def draw(hidden, step):
            uniforms = ops.slice(uniform, (0, 0, 0, step), (*shape[:3], 1))
            tokens, log_prob = linear_sample(
                ops.reshape(hidden, (-1, hidden.shape[-1])),
                head.kernel,
                ops.reshape(uniforms, (-1,)),
                temperature=self.temperature,
                soft_cap=head.soft_cap,
            )
            return ops.reshape(tokens, shape[:3]), ops.reshape(log_prob, shape[:3])

        # The first token follows the document's own last visible position.
        hidden = ops.take(document.outputs, geometry.anchors - 1, axis=1)
        hidden = ops.repeat(hidden[:, None], self.num_samples, axis=1)
        steps = self.rollout_length - 1
        decoder = block_decoder(
            policy, document, geometry.anchors, self.num_samples, steps
        )

        def body(step, carry):
            token_ids, log_prob, tokens, caches = carry
            hidden, caches = decoder(tokens, step, caches)
            tokens, new_log_prob = draw(hidden, step + 1)
            token_ids = _write(token_ids, tokens, step + 1)
            log_prob = _write(log_prob, new_log_prob, step + 1)
            return token_ids, log_prob, tokens, caches

        tokens, first_log_prob = draw(hidden, 0)
        token_ids = _write(ops.zeros(shape, dtype="int32"), tokens, 0)
        log_prob = _write(ops.zeros(shape, dtype="float32"), first_log_prob, 0)
        if steps == 0:
            return Rollouts(token_ids, log_prob)
        carry = (token_ids, log_prob, tokens, decoder.empty_caches())
        return Rollouts(*ops.fori_loop(0, steps, body, carry)[:2])

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "rollout_length": self.rollout_length,
            "stride": self.stride,
            "context_length": self.context_length,
            "num_samples": self.num_samples,
            "temperature": self.temperature,
        }


@keras.saving.register_keras_serializable("keras_ebft")
class ReplaySampler(BlockSampler):
    """Returns given rollouts instead of sampling.

    A `fit` step becomes deterministic, and comparable with other programs.

    Args:
        token_ids: int array `[B, n, K, G]`; every batch must have B documents
            with K blocks.
        **geometry: `stride`, `context_length` and `temperature` as for
            `BlockSampler`. `rollout_length` and `num_samples` follow from
            `token_ids`.

    Raises:
        TypeError: if `token_ids` are not integers.
        ValueError: if `token_ids` has not four axes, or, when called, does not
            fit the batch.

    Example:
    >>> import numpy as np
    >>> sampler = ReplaySampler(np.zeros((1, 2, 3, 4), dtype="int32"), stride=4)
    >>> sampler.num_samples, sampler.rollout_length
    (2, 4)
    """

    def __init__(self, token_ids, **geometry):
        token_ids = np.asarray(token_ids)
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise TypeError(
                "Expected `token_ids` to be integers. Received: dtype "
                f"{token_ids.dtype}. Convert them with .astype('int32')."
            )
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

    def __call__(self, policy, head, document, geometry, uniform):
        """The given rollouts; see `BlockSampler.__call__`."""
        if tuple(uniform.shape) != self.token_ids.shape:
            raise ValueError(
                "Expected rollouts for the batch, of shape [B, n, K, G] = "
                f"{tuple(uniform.shape)}. Received: token_ids of shape "
                f"{self.token_ids.shape}. Replay them on the documents, batch size "
                "and geometry they were made with."
            )
        return Rollouts(ops.convert_to_tensor(self.token_ids), None)

    def get_config(self):
        """The constructor's arguments as a dict that JSON can hold."""
        return {"token_ids": self.token_ids.tolist(), **super().get_config()}


def _write(target, update, step):
    return ops.slice_update(target, (0, 0, 0, step), update[..., None])
