"""Rollouts: every block of every document and sample, advanced together."""

from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np
from keras import ops

from keras_ebft.configurable import Configurable
from keras_ebft.data.row_batches import Rows
from keras_ebft.kernels import linear_sample
from keras_ebft.layout.blocks import (
    Blocks,
    answer_starts,
    choose_anchors,
    live_places,
    make_blocks,
)
from keras_ebft.layout.documents import Documents, take_tokens
from keras_ebft.layout.geometry import BlockGeometry
from keras_ebft.networks import OutputHead, RoutedNetwork, RowNetwork
from keras_ebft.networks.prefix_cache import DocumentState, block_decoder
from keras_ebft.typing import Tensor
from keras_ebft.validation import (
    check_choice,
    check_int,
    check_number,
    check_stop_token_ids,
    check_temperature,
)

ANCHORS = ("stride", "random", "answer_start")


@keras.saving.register_keras_serializable("keras_ebft")
class BlockSampler(Configurable):
    """Strided block-parallel sampling.

    Every `stride` tokens of a document a block starts, sees the document up to
    its anchor and generates `rollout_length` tokens, `num_samples` times
    independently. All blocks of all samples generate one token per step, so a
    step costs one forward pass of `B * n * K` tokens against the shared keys and
    values of the documents (arXiv:2603.12248; defaults are the paper's for code).

    Tokens are drawn from `softmax(logits / temperature)`, which is also the
    distribution that the policy gradient trains. With `top_k`, `top_p` or
    temperature 0 they are drawn from a part of it only; log-probabilities and the
    gradient remain those of the whole distribution (at temperature 1 where
    `temperature` is 0), so that the policy gradient is no longer unbiased.

    Args:
        rollout_length: int, generated tokens per block (G).
        stride: int, document tokens between anchors.
        context_length: int, tokens of its own document that a block sees at
            least.
        num_samples: int, independent rollouts per block (n).
        temperature: float, from 1e-4 to 1e4; 0 takes the likeliest token.
        top_p: float in (0, 1]; tokens outside the nucleus of this mass are not
            drawn.
        top_k: int or `None`; tokens outside the k likeliest are not drawn.
        anchors: `"stride"`; `"random"`: `num_anchors` per row, drawn anew each
            step among all places where a block fits; `"answer_start"`: where
            each answer begins, one long rollout per prompt, whose true text is
            the answer. Anchors given with the documents replace all of them.
        num_anchors: int, blocks per row with `"random"` (needed) and
            `"answer_start"` (1 by default); rows with fewer places have dead
            blocks.
        stop_token_ids: tuple of ints: a rollout ends with the first of them, and
            later tokens count for nothing. `"auto"` takes the tokenizer's end
            token with `anchors="answer_start"` and none otherwise. With stop
            tokens, blocks whose true text ends early live too, and are pooled
            over each one's own tokens.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range, an unknown name, or `num_anchors`
            missing or out of place.

    Example:
    >>> sampler = BlockSampler(rollout_length=4, stride=2, num_samples=2)
    >>> sampler.geometry(length=32).num_blocks
    11
    """

    def __init__(
        self,
        rollout_length: int = 8,
        stride: int = 8,
        context_length: int = 8,
        num_samples: int = 4,
        temperature: float = 0.6,
        top_p: float = 1.0,
        top_k: int | None = None,
        anchors: str = "stride",
        num_anchors: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
    ) -> None:
        self.rollout_length = check_int("rollout_length", rollout_length, 1)
        self.stride = check_int("stride", stride, 1)
        self.context_length = check_int("context_length", context_length, 1)
        self.num_samples = check_int("num_samples", num_samples, 1)
        self.temperature = check_temperature(temperature)
        self.top_p = check_number("top_p", top_p, 0.0, 1.0, exclusive=True)
        self.top_k = None if top_k is None else check_int("top_k", top_k, 1)
        self.anchors = check_choice("anchors", anchors, ANCHORS)
        self.num_anchors = _check_num_anchors(num_anchors, anchors)
        self.stop_token_ids = check_stop_token_ids(stop_token_ids)

    @property
    def scoring_temperature(self) -> float:
        """Temperature of the distribution that is trained."""
        return self.temperature or 1.0

    @property
    def draws_tokens(self) -> bool:
        """Whether rollouts are drawn, each independently of the others."""
        return True

    @property
    def draws_anchors(self) -> bool:
        """Whether anchors are random."""
        return self.anchors == "random"

    @property
    def has_stop_tokens(self) -> bool:
        """Whether rollouts end with a stop token."""
        if isinstance(self.stop_token_ids, str):
            return self.anchors == "answer_start"
        return bool(self.stop_token_ids)

    def geometry(self, length: int) -> BlockGeometry:
        """`BlockGeometry` of documents of `length` tokens."""
        return BlockGeometry(
            length, self.context_length, self.rollout_length, self.stride
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises if a token that was named is outside a model's vocabulary.

        Args:
            size: int, how many token ids the model knows.

        Raises:
            ValueError: for stop tokens that no rollout can ever hold.
        """
        named = self.stop_token_ids
        wrong = [] if isinstance(named, str) else [t for t in named or () if t >= size]
        if wrong:
            raise ValueError(
                f"Expected `stop_token_ids` from 0 to {size - 1}, the model's "
                f"vocabulary. Received: {wrong[0]}, at which no rollout can end. Use "
                "ids of the model's tokenizer."
            )

    def check_rows(self, rows: Rows) -> None:
        """Raises if rows of this shape cannot be sampled from.

        Args:
            rows: dict of arrays as `fit` takes them, `[B, T]`.

        Raises:
            ValueError: for rows too short to hold a block, or answers missing.
        """
        if "anchors" in rows:
            return
        length = rows["token_ids"].shape[1]
        if self.anchors == "answer_start":
            if "answer_mask" not in rows:
                raise ValueError(
                    "Expected an 'answer_mask' with the documents, because "
                    'anchors="answer_start" puts blocks where answers begin. '
                    f"Received: {sorted(rows)}. Add the mask, or use other anchors."
                )
        else:
            self.geometry(length)
        if self.num_anchors is not None and self.num_anchors > length:
            raise ValueError(
                f"Expected rows of at least num_anchors={self.num_anchors} tokens. "
                f"Received: {length}. Use fewer anchors."
            )

    def num_blocks(self, documents: Documents) -> int:
        """Blocks per row, K."""
        if documents.anchors is not None:
            return documents.anchors.shape[1]
        if self.num_anchors is not None:
            return self.num_anchors
        return self.geometry(documents.token_ids.shape[1]).num_blocks

    def blocks(
        self, documents: Documents, uniform: Tensor | None = None, stops: bool = False
    ) -> Blocks:
        """Where the blocks of documents stand.

        Args:
            documents: `Documents`.
            uniform: float32 tensor `[B, T]` in [0, 1), decides random anchors.
            stops: bool, whether rollouts can end early.

        Returns:
            `Blocks`.
        """
        if documents.anchors is not None:
            anchors = documents.anchors
        elif self.anchors == "stride":
            anchors = self.geometry(documents.token_ids.shape[1]).anchors
        elif self.anchors == "random":
            anchors = self._random_anchors(documents, uniform, stops)
        else:
            anchors = self._answer_anchors(documents)
        return self.blocks_at(documents, anchors, stops)

    def blocks_at(
        self, documents: Documents, anchors: Tensor, stops: bool = False
    ) -> Blocks:
        """Blocks at given places, which live and count as those of `blocks` do.

        Args:
            documents: `Documents`.
            anchors: int32 NumPy array `[K]` or int32 tensor `[B, K]`, -1 for none.
            stops: bool, whether rollouts can end early.

        Returns:
            `Blocks`.
        """
        options = self._options(documents.anchors is not None, stops)
        return make_blocks(documents, anchors, self.rollout_length, **options)

    def live_blocks(self, rows: Rows, stops: bool = False) -> np.ndarray:
        """How many blocks of each row live, without asking a backend.

        Args:
            rows: dict of arrays as `fit` takes them, `[B, T]`.
            stops: bool, whether rollouts can end early.

        Returns:
            int array `[B]`.
        """
        given = rows.get("anchors")
        options = self._options(given is not None, stops)
        lives = live_places(rows, self.rollout_length, **options)
        if given is not None:
            lives = np.take_along_axis(lives, np.maximum(given, 0), axis=1)
            return (lives & (given > 0)).sum(axis=1)
        if self.anchors == "stride":
            return lives[:, self.geometry(lives.shape[1]).anchors].sum(axis=1)
        if self.anchors == "answer_start":
            lives &= _begins_answer(rows)
        return np.minimum(lives.sum(axis=1), cast(int, self.num_anchors))

    def _options(self, anchors_given: bool, stops: bool) -> dict[str, Any]:
        """What `make_blocks` is told."""
        if anchors_given:
            return {"short_windows": stops}
        if self.anchors == "answer_start":
            return {"short_windows": True, "answer_only": True}
        return {"short_windows": stops, "context_length": self.context_length}

    def _random_anchors(
        self, documents: Documents, uniform: Tensor, stops: bool
    ) -> Tensor:
        everywhere = np.arange(documents.token_ids.shape[1], dtype="int32")
        fits = self.blocks_at(documents, everywhere, stops)
        return choose_anchors(fits.live, uniform, cast(int, self.num_anchors))

    def _answer_anchors(self, documents: Documents) -> Tensor:
        earliest = np.arange(documents.token_ids.shape[1], 0, -1, dtype="float32")
        everywhere = np.arange(documents.token_ids.shape[1], dtype="int32")
        # A piece of a cut answer begins with an answer that has no prompt.
        fits = self.blocks_at(documents, everywhere).live
        allowed = ops.logical_and(answer_starts(documents), fits)
        return choose_anchors(allowed, earliest, cast(int, self.num_anchors))

    def __call__(
        self,
        policy: RoutedNetwork | RowNetwork,
        head: OutputHead,
        document: DocumentState,
        blocks: Blocks,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Samples rollouts.

        Args:
            policy: `RoutedNetwork` that read the documents.
            head: `OutputHead`.
            document: `DocumentState` without gradient.
            blocks: `Blocks`.
            uniform: float32 tensor `[B, n, K, G]` in [0, 1); each number decides
                one token.

        Returns:
            `(token_ids, log_prob)`: int32 and float32 tensors `[B, n, K, G]`.
        """
        shape = tuple(uniform.shape)

        def draw(hidden: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            uniforms = ops.slice(uniform, (0, 0, 0, step), (*shape[:3], 1))
            tokens, log_prob = linear_sample(
                ops.reshape(hidden, (-1, hidden.shape[-1])),
                head.kernel,
                ops.reshape(uniforms, (-1,)),
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                soft_cap=head.soft_cap,
            )
            return ops.reshape(tokens, shape[:3]), ops.reshape(log_prob, shape[:3])

        # The first token follows the document's own last visible position.
        hidden = take_tokens(document.outputs, blocks.anchors - 1)
        hidden = ops.repeat(hidden[:, None], shape[1], axis=1)
        steps = self.rollout_length - 1
        decoder = block_decoder(policy, document, blocks, shape[:3], steps)

        def body(step: Tensor, carry: tuple[Any, ...]) -> tuple[Any, ...]:
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
            return token_ids, log_prob
        carry = (token_ids, log_prob, tokens, decoder.empty_caches())
        return tuple(ops.fori_loop(0, steps, body, carry)[:2])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a dict that JSON can hold."""
        return {
            "rollout_length": self.rollout_length,
            "stride": self.stride,
            "context_length": self.context_length,
            "num_samples": self.num_samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "anchors": self.anchors,
            "num_anchors": self.num_anchors,
            "stop_token_ids": self.stop_token_ids,
        }


def _begins_answer(rows: Rows) -> np.ndarray:
    """Where an answer goes on from a token of the same document that is none."""
    answers = rows["answer_mask"] & rows["padding_mask"]
    segments = rows.get("segment_ids", np.zeros(answers.shape, "int32"))
    begins = np.ones(answers.shape, bool)
    same = segments[:, 1:] == segments[:, :-1]
    begins[:, 1:] = ~(answers[:, :-1] & same)
    return answers & begins


def _check_num_anchors(num_anchors: int | None, anchors: str) -> int | None:
    if num_anchors is not None:
        if anchors == "stride":
            raise ValueError(
                'Expected no `num_anchors` with anchors="stride", whose blocks follow '
                f"from the documents' length. Received: num_anchors={num_anchors}. "
                'Leave it out, or use anchors="random".'
            )
        return check_int("num_anchors", num_anchors, 1)
    if anchors == "random":
        raise ValueError(
            'Expected `num_anchors`, blocks per row, with anchors="random". Received: '
            "None. Pass for example num_anchors=32."
        )
    return 1 if anchors == "answer_start" else None


def _write(target: Tensor, update: Tensor, step: Tensor) -> Tensor:
    return ops.slice_update(target, (0, 0, 0, step), update[..., None])
