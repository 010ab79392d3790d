"""What training changed on held-out documents, seen on the same rollouts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_ebft.backend.runtime import no_gradient
from keras_ebft.configurable import Shown
from keras_ebft.data.row_batches import Rows
from keras_ebft.evaluation.feature_matching import measuring_model
from keras_ebft.evaluation.models import causal_lm_of
from keras_ebft.functional.pooling import unit_length
from keras_ebft.model import EBFTModel
from keras_ebft.networks import to_numpy
from keras_ebft.training.token_rows import to_token_rows
from keras_ebft.validation import check_int

LEAST_SAMPLES = 3


class Change(NamedTuple):
    """A mean difference over documents, and half of its 95 % interval.

    Attributes:
        mean: float.
        half_width: float; infinite for a single document.
    """

    mean: float
    half_width: float

    @property
    def is_visible(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half_width


def paired_change(before: np.ndarray, after: np.ndarray) -> Change:
    """The change of a quantity that was measured twice on the same documents.

    Args:
        before: float array `[N]`.
        after: float array `[N]`.

    Returns:
        `Change`, with the interval of a normal distribution.

    Raises:
        ValueError: for arrays that are not of one dimension and of one length.

    Example:
    >>> import numpy as np
    >>> paired_change(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.5, 3.5]))
    Change(mean=0.5, half_width=0.0)
    """
    before, after = np.asarray(before, "float64"), np.asarray(after, "float64")
    if before.ndim != 1 or before.shape != after.shape or not before.size:
        raise ValueError(
            "Expected two arrays of one value per document. Received shapes: "
            f"{before.shape} and {after.shape}. Measure both on the same documents."
        )
    difference = after - before
    count = len(difference)
    error = difference.std(ddof=1) / np.sqrt(count) if count > 1 else np.inf
    return Change(float(difference.mean()), float(1.96 * error))


class PairedFeatureMatching(Shown):
    """Feature matching under the weights of the moment, on rollouts drawn once.

    Two measurements on rollouts of their own differ by the noise of drawing, which
    hides what a short training changes. Here rollouts are drawn when the object is
    made, and weighed in every call by how much likelier the weights of the moment
    make them (importance sampling):

        E_p[f(y)] = E_p0[w(y) f(y)],
        w(y) = prod_t p(y_t | c, y_<t) / p0(y_t | c, y_<t)

    with p0 the model as it was then, at the sampling temperature. That is unbiased for
    any p, and exact where nothing changed. Since `E_p0[w] = 1`, `(w - 1)` times what
    the other rollouts of a block say is taken off, which has mean 0 and is
    most of the noise. The noise grows with the change: see `effective_samples`.

    Made before training, because the frozen network that measures is a copy of the
    model as it is then, as with `FeatureMatching`.

    Args:
        model: `EBFTModel` or `keras_hub.models.CausalLM`, as for `FeatureMatching`; it
            is the weights of its causal language model that are measured, whatever
            trains them.
        x: held-out documents in memory, of any form `EBFTModel.fit` accepts.
        num_samples: int, rollouts per block, at least 3.
        batch_size: int, documents per step.
        seed: int, decides the rollouts.

    Attributes:
        effective_samples: float, by the last call: how many of the rollouts, as a
            share, say something of the weights of the moment. Below about a half,
            draw anew: make another object.

    Raises:
        TypeError: for another kind of model or value.
        ValueError: for too few samples, documents that cannot be used, a greedy sampler
            or one that draws from a part of the distribution, or `"token"` pooling.

    Example:
    ```python
    measure = keras_ebft.evaluation.PairedFeatureMatching(model, held_out)
    before = measure()
    model.fit(texts)
    after = measure()
    name = "feature_matching_loss"
    keras_ebft.evaluation.paired_change(before[name], after[name])
    ```
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        num_samples: int = 8,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        num_samples = check_int("num_samples", num_samples, LEAST_SAMPLES)
        batch_size = check_int("batch_size", batch_size, 1)
        self._model = measuring_model(model, num_samples, seed)
        _check(self._model)
        self.effective_samples = 1.0
        rows = to_token_rows(x, self._model.causal_lm)
        self._batches = [
            _draw(self._model, batch, skipped, seed + first)
            for batch, skipped, first in _overlapping_batches(rows, batch_size)
        ]

    def _shown_settings(self) -> dict[str, Any]:
        return {
            "num_samples": self._model.sampler.num_samples,
            "documents": sum(len(b.rows["token_ids"]) for b in self._batches),
            "seed": self._model.seed,
        }

    def __call__(self, model: Any = None) -> dict[str, np.ndarray]:
        """Measures the weights of the moment.

        Args:
            model: `None`, or the model that this was made for, or another on the
                same causal language model, as `callbacks.Measure` passes it.

        Returns:
            dict of float64 arrays `[N]`, one value per document (NaN for one without
            a live block). Without whitening, of features of which each window's have
            length 1 together: `feature_matching_loss`, the unbiased estimate of
            `|E[phi] - phi_*|^2`, and `alignment`, `2 cos`;
            `token_match`, the share of tokens that are the true ones; and
            `cross_entropy` in nats per token.

        Raises:
            ValueError: for a model with other weights.
        """
        if model is not None and causal_lm_of(model) is not self._model.causal_lm:
            raise ValueError(
                "Expected the causal language model whose rollouts were drawn. "
                f"Received: another, of {model!r}. Make a PairedFeatureMatching of it."
            )
        parts = [batch.measure(self._model) for batch in self._batches]
        measured = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }
        self.effective_samples = float(np.nanmean(measured.pop("effective_samples")))
        return measured


class _Drawn(NamedTuple):
    """Rollouts of a batch, and what does not depend on the weights of the moment."""

    rows: Rows
    skipped: int
    rollouts: Any
    # [B, K]
    live: np.ndarray
    # [B, K, n]
    log_prob: np.ndarray
    alignment: np.ndarray
    token_match: np.ndarray
    # [B, K, n, n], of what rollouts are away from the truth
    distances: np.ndarray

    def measure(self, model: EBFTModel) -> dict[str, np.ndarray]:
        log_prob, cross_entropy = _scores(model, self.rows, self.rollouts)
        weights = np.exp(log_prob - self.log_prob)
        per_block = {
            "feature_matching_loss": weighted_pairs(self.distances, weights),
            "alignment": weighted_mean(self.alignment, weights),
            "token_match": weighted_mean(self.token_match, weights),
            "effective_samples": weights.mean(-1) ** 2 / (weights**2).mean(-1),
        }
        measured = {
            name: _mean(values, self.live)[self.skipped :]
            for name, values in per_block.items()
        }
        return {**measured, "cross_entropy": cross_entropy[self.skipped :]}


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`E_p[f]` from samples of p0, with the others of a block as control variate.

    Args:
        values: float array `[..., n]`, f of each sample.
        weights: float array `[..., n]`, p / p0 of each sample.

    Returns:
        float array `[...]`: `mean_i (w_i f_i - (w_i - 1) mean_{j != i} f_j)`.
    """
    count = values.shape[-1]
    others = (values.sum(-1, keepdims=True) - values) / (count - 1)
    return (weights * values - (weights - 1.0) * others).mean(-1)


def weighted_pairs(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`E_p[h(y, y')]` of independent y, y' from samples of p0.

    Args:
        products: float array `[..., n, n]`, symmetric: h of each pair of samples.
        weights: float array `[..., n]`, p / p0 of each sample.

    Returns:
        float array `[...]`: `mean_{i != j} w_i w_j h_ij - 2 mean_i (w_i - 1) m_i`, with
        m_i the mean of h over pairs without sample i.
    """
    count = products.shape[-1]
    apart = products * (1.0 - np.eye(count))
    of_each = apart.sum(-1)
    total = of_each.sum(-1, keepdims=True)
    without = (total - 2.0 * of_each) / ((count - 1) * (count - 2))
    pairs = np.einsum("...i,...j,...ij->...", weights, weights, apart)
    pairs /= count * (count - 1)
    return pairs - 2.0 * ((weights - 1.0) * without).mean(-1)


def _check(model: EBFTModel) -> None:
    """Refuses what rollouts cannot be weighed for."""
    sampler = model.sampler
    if not sampler.temperature or sampler.top_p < 1.0 or sampler.top_k is not None:
        raise ValueError(
            "Expected a sampler that draws from the whole distribution: other "
            "rollouts cannot be weighed. Received: "
            f"temperature={sampler.temperature}, top_p={sampler.top_p}, "
            f"top_k={sampler.top_k}. Use `FeatureMatching`."
        )
    if model.feature_network.pooling == "token":
        raise ValueError(
            "Expected features of whole windows. Received: a feature network with "
            'pooling="token". Pass a model with another pooling, or use '
            "`FeatureMatching`."
        )


def _overlapping_batches(
    rows: Rows, batch_size: int
) -> Iterator[tuple[Rows, int, int]]:
    """Batches of one size, rows of each that came before, and its first row."""
    count = len(rows["token_ids"])
    size = min(batch_size, count)
    for start in range(0, count, size):
        first = min(start, count - size)
        batch = {name: values[first : first + size] for name, values in rows.items()}
        yield batch, start - first, first


def _draw(model: EBFTModel, rows: Rows, skipped: int, seed: int) -> _Drawn:
    rollouts = model.rollout(rows, seed=seed)
    features = model.features(rows, rollouts)
    # Each window's of length 1, whatever the pooling.
    generated, target = (
        to_numpy(unit_length(value)).astype("float64") for value in features
    )
    generated = np.moveaxis(generated, 1, 2)
    generated = generated.reshape(*generated.shape[:3], -1)
    target = target.reshape(*target.shape[:2], 1, -1)
    away = generated - target
    anchors = to_numpy(rollouts["anchors"])
    log_prob, _ = _scores(model, rows, rollouts)
    return _Drawn(
        rows=rows,
        skipped=skipped,
        rollouts=rollouts,
        live=anchors >= 0,
        log_prob=log_prob,
        alignment=2.0 * (generated * target).sum(-1),
        token_match=_token_match(rows["token_ids"], rollouts, anchors),
        distances=away @ np.swapaxes(away, -1, -2),
    )


def _token_match(
    token_ids: np.ndarray, rollouts: Any, anchors: np.ndarray
) -> np.ndarray:
    """Share of tokens that are those of the documents, `[B, K, n]`."""
    written = np.moveaxis(to_numpy(rollouts["token_ids"]), 1, 2)
    known = rollouts["mask"] & rollouts["true_exists"][:, None]
    counts = np.moveaxis(to_numpy(known), 1, 2)
    places = anchors[..., None] + np.arange(written.shape[-1])
    places = np.clip(places, 0, token_ids.shape[1] - 1)
    row = np.arange(len(token_ids))[:, None, None]
    same = (written == token_ids[row, places][:, :, None]) & counts
    return same.sum(-1) / np.maximum(counts.sum(-1), 1)


def _scores(
    model: EBFTModel, rows: Rows, rollouts: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of rollouts `[B, K, n]`, and cross-entropy `[B]`."""
    with no_gradient():
        scores = model.score(rows, rollouts)
    log_prob = to_numpy(scores["log_prob"]).astype("float64")
    # All that was drawn: later tokens follow those that do not count, too.
    log_prob = np.where(_drawn_tokens(rollouts), log_prob, 0.0).sum(-1)
    of_document = to_numpy(scores["document_log_prob"]).astype("float64")
    counts = _predicted(rows)
    cross_entropy = -_mean(of_document, counts)
    return np.moveaxis(log_prob, 1, 2), cross_entropy


def _drawn_tokens(rollouts: Any) -> np.ndarray:
    """Tokens of living blocks up to where rollouts end, bool `[B, n, K, G]`."""
    live = to_numpy(rollouts["anchors"]) >= 0
    return to_numpy(rollouts["alive"]) & live[:, None, :, None]


def _predicted(rows: Rows) -> np.ndarray:
    """Which next tokens count for the cross-entropy, bool `[B, T - 1]`."""
    counts = rows["padding_mask"][:, 1:].copy()
    if "segment_ids" in rows:
        counts &= rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]
    if "answer_mask" in rows:
        counts &= rows["answer_mask"][:, 1:]
    return counts


def _mean(values: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Means over what is live, `[B]`; NaN where nothing is."""
    count = live.sum(-1)
    total = np.where(live, values, 0.0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
