"""How likely a model finds held-out texts."""

import math
from collections.abc import Callable
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_ebft.backend.runtime import compiled, no_gradient
from keras_ebft.data.row_batches import Rows
from keras_ebft.evaluation.models import causal_lm_of
from keras_ebft.evaluation.single_documents import single_documents
from keras_ebft.model import EBFTModel
from keras_ebft.networks.adapters import adapted_layers
from keras_ebft.training.token_rows import to_token_rows
from keras_ebft.typing import Tensor
from keras_ebft.validation import check_int

# Where a model keeps its compiled scores.
PROGRAM = "_keras_ebft_scores"


def cross_entropy(
    model: EBFTModel | keras_hub.models.CausalLM, x: Any, batch_size: int = 16
) -> dict[str, float]:
    """Next-token cross-entropy and perplexity of documents, at temperature 1.

    Args:
        model: `EBFTModel` or `keras_hub.models.CausalLM`.
        x: documents in memory, of any form `fit` accepts; packed ones are read one
            by one.
        batch_size: int, documents per forward pass. A pass holds
            `batch_size * T * vocabulary` float32 logits.

    Returns:
        dict of floats: `cross_entropy` (nats per token), `perplexity` and `tokens`
        (how many were predicted); of pairs or with an `answer_mask` also
        `answer_cross_entropy`, `answer_perplexity` and `answer_tokens`.

    Raises:
        TypeError: for token ids that are not integers, or another kind of model.
        ValueError: for documents that cannot be used, or none with two tokens.

    Example:
    ```python
    keras_ebft.evaluation.cross_entropy(model, held_out)["perplexity"]
    ```
    """
    causal_lm = causal_lm_of(model)
    batch_size = check_int("batch_size", batch_size, 1)
    rows = to_token_rows(x, causal_lm)
    has_answers = "answer_mask" in rows
    rows = single_documents(rows)
    masks = {"": rows["padding_mask"][:, 1:]}
    if has_answers:
        masks["answer_"] = rows["answer_mask"][:, 1:]
    for prefix, mask in masks.items():
        _check_not_empty(prefix, mask)
    log_prob = _log_prob(causal_lm, rows, batch_size)
    measured: dict[str, float] = {}
    for prefix, mask in masks.items():
        measured |= _mean(prefix, log_prob, mask)
    return measured


def _scores_of(causal_lm: keras_hub.models.CausalLM) -> Callable[..., Tensor]:
    """Function of token ids and mask to log-probabilities, compiled where it pays.

    It is kept with the model, which may be measured after every epoch: compiling takes
    longer than measuring.
    """
    # What a program reads besides its arguments.
    enabled = [layer.lora_enabled for layer in adapted_layers(causal_lm.backbone)]
    known, run = vars(causal_lm).get(PROGRAM, (None, None))
    if known == enabled:
        return run

    def score(token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        logits = causal_lm({"token_ids": token_ids, "padding_mask": padding_mask})
        return -ops.sparse_categorical_crossentropy(
            token_ids[:, 1:], ops.cast(logits[:, :-1], "float32"), from_logits=True
        )

    run = compiled(score, lambda: causal_lm.variables)
    # Past the trackers of Keras, which would wrap it.
    object.__setattr__(causal_lm, PROGRAM, (enabled, run))
    return run


def _log_prob(
    causal_lm: keras_hub.models.CausalLM, rows: Rows, batch_size: int
) -> np.ndarray:
    """Log-probability of every next token, float64 `[N, T - 1]`."""
    run = _scores_of(causal_lm)
    count = len(rows["token_ids"])
    found = []
    for start in range(0, count, batch_size):
        # The last batch starts earlier and overlaps, so that all have one shape.
        first = max(min(start, count - batch_size), 0)
        batch = [
            ops.convert_to_tensor(rows[name][first : first + batch_size])
            for name in ("token_ids", "padding_mask")
        ]
        with no_gradient():
            scores = ops.convert_to_numpy(run(*batch))
        found.append(scores[start - first :].astype("float64"))
    return np.concatenate(found)


def _check_not_empty(prefix: str, mask: np.ndarray) -> None:
    if not mask.any():
        raise ValueError(
            f"Expected at least one {'answer ' if prefix else ''}token with a token "
            "before it. Received: none. Check the documents."
        )


def _mean(prefix: str, log_prob: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    tokens = int(np.count_nonzero(mask))
    loss = float(-log_prob[mask].sum() / tokens)
    return {
        f"{prefix}cross_entropy": loss,
        f"{prefix}perplexity": math.exp(loss),
        f"{prefix}tokens": tokens,
    }
