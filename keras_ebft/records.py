"""What passes between the stages of a step."""

from typing import Any, NamedTuple


class Rollouts(NamedTuple):
    """Generated tokens and their log-probabilities.

    Attributes:
        token_ids: int32 tensor `[B, n, K, G]`.
        log_prob: float32 tensor `[B, n, K, G]` at the sampling temperature, in
            nats; `None` where the tokens were given.
    """

    token_ids: Any
    log_prob: Any


class RolloutBatch(NamedTuple):
    """The tokens of a batch of rollouts.

    Attributes:
        documents: `Documents`.
        blocks: `Blocks`.
        token_ids: int32 tensor `[B, n, K, G]`.
        alive: bool tensor `[B, n, K, G]`, tokens up to and with the stop token.
    """

    documents: Any
    blocks: Any
    token_ids: Any
    alive: Any
