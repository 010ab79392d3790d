"""Rollouts as people read them: texts beside the truth, with their rewards."""

import math
from collections.abc import Iterable
from typing import Any

import keras_hub
import numpy as np

from keras_ebft.networks import TextDecoder, tokenizer

REWARDS = ("alignment", "diversity", "reward", "advantage")


def completion_records(
    arrays: dict[str, np.ndarray], causal_lm: keras_hub.models.CausalLM
) -> list[dict[str, Any]]:
    """One record per live block, as `EBFTModel.completions` returns them.

    Args:
        arrays: dict of `document` int `[B, T]`; `anchors` int `[B, K]`, -1 for dead
            blocks; optionally `starts` int `[B, K]`; `true_index` int and
            `true_exists` bool `[B, K, G]`; `token_ids` int, `alive` and `mask` bool
            and `log_prob` float `[B, n, K, G]`; optionally `ended` bool `[B, n, K]`;
            and the rewards by name, float `[B, n, K]` or `[B, n, K, G]`.
        causal_lm: the `CausalLM` that wrote them.

    Returns:
        list of dicts that JSON can hold.
    """
    texts = _Texts(causal_lm)
    return [
        _block(arrays, texts, int(row), int(block))
        for row, block in np.argwhere(arrays["anchors"] >= 0)
    ]


class _Texts:
    """Token ids to text; without a tokenizer they stay what they are."""

    def __init__(self, causal_lm: keras_hub.models.CausalLM) -> None:
        own: Any = tokenizer(causal_lm)
        self._decoder = None if own is None else TextDecoder(own)

    def text(self, token_ids: Iterable[int], goes_on: bool) -> str | list[int]:
        """The text of tokens, as one that goes on from another or by itself."""
        token_ids = [int(token) for token in token_ids]
        if self._decoder is None:
            return token_ids
        return self._decoder(token_ids, goes_on)

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """What each token adds to the text before it; the pieces make up the text.

        A character that takes several tokens stands with the last of them.
        """
        token_ids = [int(token) for token in token_ids]
        if self._decoder is None:
            return [str(token) for token in token_ids]
        written, found = "", []
        for count in range(1, len(token_ids) + 1):
            text = self._decoder(token_ids[:count], goes_on=True)
            complete = text.startswith(written) and not text.endswith("\ufffd")
            if not complete and count < len(token_ids):
                found.append("")
                continue
            found.append(text[len(written) :])
            written = text
        return found


def _block(
    arrays: dict[str, np.ndarray], texts: _Texts, row: int, block: int
) -> dict[str, Any]:
    document = arrays["document"][row]
    anchor = int(arrays["anchors"][row, block])
    start = arrays["starts"][row, block] if "starts" in arrays else 0
    truth = arrays["true_index"][row, block][arrays["true_exists"][row, block]]
    samples = range(arrays["token_ids"].shape[1])
    return {
        "row": row,
        "anchor": anchor,
        "prompt": texts.text(document[start:anchor], goes_on=False),
        "truth": texts.text(document[truth], goes_on=True),
        "rollouts": [_rollout(arrays, texts, (row, j, block)) for j in samples],
    }


def _rollout(
    arrays: dict[str, np.ndarray], texts: _Texts, place: tuple[int, int, int]
) -> dict[str, Any]:
    alive = arrays["alive"][place]
    token_ids = arrays["token_ids"][place][alive]
    ended = arrays.get("ended")
    return {
        "text": texts.text(token_ids, goes_on=True),
        **{
            name: _number(arrays[name][place], arrays["mask"][place])
            for name in REWARDS
        },
        "tokens": texts.pieces(token_ids),
        "log_prob": [_finite(value) for value in arrays["log_prob"][place][alive]],
        "ended": None if ended is None else bool(ended[place]),
    }


def _number(value: np.ndarray, mask: np.ndarray) -> Any:
    """A float, or a list of one for each token that counts."""
    if not value.ndim:
        return _finite(value)
    return [_finite(part) for part in value[mask]]


def _finite(value: Any) -> float | None:
    """JSON has no word for NaN and infinity."""
    return float(value) if math.isfinite(value) else None
