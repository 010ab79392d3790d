"""What passes between the stages of a step.

Each record is made by one stage, read by those after it and changed by none. They
are named tuples, which every backend takes apart and puts together by itself.

Axes: B rows, T tokens of a row, n samples, K blocks, G generated tokens per block,
F features, D feature width.
"""

from typing import NamedTuple

from keras import ops

from keras_ebft.layout.blocks import Blocks
from keras_ebft.layout.documents import Documents
from keras_ebft.typing import Tensor


class Rollouts(NamedTuple):
    """Rollouts, with the blocks they stand in and the documents they continue.

    Attributes:
        documents: `Documents`.
        blocks: `Blocks`.
        token_ids: int32 `[B, n, K, G]`.
        alive: bool `[B, n, K, G]`, tokens up to and with the stop token.
        log_prob: float32 `[B, n, K, G]` at the sampling temperature, in nats, as
            they were sampled; `None` where the tokens were given.
        ended: bool `[B, n, K]`, whether a stop token was written; `None` where
            there are no stop tokens.
    """

    documents: Documents
    blocks: Blocks
    token_ids: Tensor
    alive: Tensor
    log_prob: Tensor | None = None
    ended: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """Generated tokens that count, bool `[B, n, K, G]`."""
        return ops.logical_and(self.blocks.counted[:, None], self.alive)


class FrozenReading(NamedTuple):
    """What the frozen networks say of rollouts and of the true continuations.

    Attributes:
        generated: float32 `[B, n, K, F, D]`, features of rollouts;
            `[B, n, K, G, F, D]` with `"token"` pooling.
        target: float32 `[B, K, F, D]` or `[B, K, G, F, D]`, features of the truth.
        reference_log_prob: float32 `[B, n, K, G]`, log-probabilities of the
            generated tokens under the initial model.

    Each is `None` where nothing asks for it.
    """

    generated: Tensor | None = None
    target: Tensor | None = None
    reference_log_prob: Tensor | None = None


class Judged(NamedTuple):
    """Rewards and advantages, 0 in what does not count.

    With `"token"` pooling every token has its own: `[B, n, K, G]` then stands for
    `[B, n, K]`, and `[B, K, G]` for `[B, K]`.

    Attributes:
        alignment: float32 `[B, n, K]`.
        diversity: float32 `[B, n, K]`.
        reward: float32 `[B, n, K]`.
        advantage: float32 `[B, n, K]`.
        mask: float32 `[B, n, K]`, 1 where a reward counts.
        measures: dict of float32 `[B, K]`, the reward's own measures by name.
    """

    alignment: Tensor
    diversity: Tensor
    reward: Tensor
    advantage: Tensor
    mask: Tensor
    measures: dict[str, Tensor]


class Experience(NamedTuple):
    """What a step learns from: rollouts, and what was said of them.

    Attributes:
        rollouts: `Rollouts`.
        frozen: `FrozenReading`.
        judged: `Judged`.
        old_log_prob: float32 `[B, n, K, G]`, log-probabilities under the policy
            that sampled; `None` where that is the policy as it is now.
    """

    rollouts: Rollouts
    frozen: FrozenReading
    judged: Judged
    old_log_prob: Tensor | None = None

    def without_features(self) -> "Experience":
        """The same without what was rewarded already, by far the largest of it."""
        frozen = self.frozen._replace(generated=None, target=None)
        return self._replace(frozen=frozen)


class RolloutScores(NamedTuple):
    """What the policy says of rollouts, with gradient.

    Attributes:
        log_prob: float32 `[B, n, K, G]` at the sampling temperature, in nats.
        entropy: float32 `[B, n, K, G]` at the sampling temperature, in nats.
    """

    log_prob: Tensor
    entropy: Tensor


class DocumentScores(NamedTuple):
    """What the policy says of every next token of the documents.

    Attributes:
        log_prob: float32 `[B, T - 1]` at temperature 1, in nats.
        mask: float32 `[B, T - 1]`, 1 where a token counts.
    """

    log_prob: Tensor
    mask: Tensor


class LossTerms(NamedTuple):
    """The terms of the loss and what is measured with them, float32 scalars.

    `None` stands for what the settings leave out.
    """

    ce_loss: Tensor
    policy_loss: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    critic_loss: Tensor | None = None
    critic_accuracy: Tensor | None = None

    def measured(self) -> dict[str, Tensor]:
        """The terms that there are, by name."""
        return {k: v for k, v in self._asdict().items() if v is not None}


class Batch(NamedTuple):
    """What `EBFTModel.call` takes.

    Attributes:
        documents: `Documents`.
        experience: `Experience` of an earlier update of the same batch, or `None`:
            then rollouts are sampled.
    """

    documents: Documents
    experience: Experience | None = None


class StepOutputs(NamedTuple):
    """What `EBFTModel.call` returns: everything up to the loss.

    Attributes:
        terms: `LossTerms`.
        document_scores: `DocumentScores`.
        experience: `Experience`; `None` where documents alone are learned from.
        scores: `RolloutScores`; `None` with it.
        weighted: dict of float32 scalars, the terms as the loss weighs them, and
            what its layers add (`regularization`); the loss is their sum.
    """

    terms: LossTerms
    document_scores: DocumentScores
    experience: Experience | None = None
    scores: RolloutScores | None = None
    weighted: dict[str, Tensor] | None = None
