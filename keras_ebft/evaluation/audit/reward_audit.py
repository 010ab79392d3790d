"""What a reward would reward, measured before anything is trained."""

from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_ebft.backend.runtime import compiled, no_gradient
from keras_ebft.configurable import Shown
from keras_ebft.evaluation.audit.candidates import check_lists, make_candidates
from keras_ebft.evaluation.audit.controls import control_rollouts
from keras_ebft.evaluation.audit.measures import measure
from keras_ebft.evaluation.audit.qualities import QUALITIES, compare_with_truth
from keras_ebft.evaluation.audit.result import AuditResult
from keras_ebft.evaluation.models import causal_lm_of
from keras_ebft.features import FeatureNetwork
from keras_ebft.features.feature_network import DEFAULT_LAYERS
from keras_ebft.model import EBFTModel
from keras_ebft.networks import num_layers
from keras_ebft.records import FrozenReading
from keras_ebft.rewards import FeatureMatchingReward, VerifierReward
from keras_ebft.samplers import BlockSampler
from keras_ebft.step import judged
from keras_ebft.training.token_rows import to_token_rows
from keras_ebft.validation import check_instance, check_int

SIGNALS = ("alignment", "reward", "advantage")


class RewardAudit(Shown):
    """Does the reward prefer the rollouts that are better? Asked before training.

    Rollouts are sampled once, the frozen network reads them and the documents once,
    and for every combination of settings the library's own features, rewards and
    advantages are made of that reading. They are compared, within blocks, with what
    is known to be good about a rollout: the share of true tokens, the length of the
    true prefix, whether the last token is the true one, and scores of your own.

    Args:
        model: `EBFTModel` that has not been trained, whose sampler, weights of the
            reward, advantage and `network` are used and whose own setting is
            audited too; or a `keras_hub.models.CausalLM`.
        layers: list of tuples, each as `FeatureNetwork` takes `layers`; for the
            modes `"concat"` and `"stack"`.
        modes: list of modes of `FeatureNetwork`.
        poolings: list of poolings.
        whitenings: list of whitenings of `FeatureMatchingReward`.
        scores: dict from a name to a `VerifierReward`, or to a function
            `fn(prompts, completions, targets)` as `VerifierReward` takes it. The
            first is what settings are sorted by; without any, `"share"` is.
        sampler: `BlockSampler`, in place of the model's.
        resamples: int, of the bootstrap over documents.
        seed: int, decides rollouts, controls and resamples.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an unknown name, an empty list, a layer that is not there, a
            single rollout per block, or a model that has been trained.

    Example:
    ```python
    audit = keras_ebft.evaluation.RewardAudit(model)
    result = audit(held_out)
    print(result)
    print(result.advice)
    keras_ebft.plots.reward_audit(result).savefig("audit.png")
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[Sequence[int | float] | None] = (
            DEFAULT_LAYERS,
            (0.25,),
            (0.75,),
        ),
        modes: Sequence[str] = ("concat",),
        poolings: Sequence[str] = ("last_token", "mean", "concat"),
        whitenings: Sequence[str | None] = ("rollout", None),
        scores: dict[str, Any] | None = None,
        sampler: BlockSampler | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        causal_lm = causal_lm_of(model)
        check_lists(layers, modes, poolings, whitenings)
        self._resamples = check_int("resamples", resamples, 1)
        self._seed = check_int("seed", seed, 0)
        network, reward, self._advantage, own_sampler = _parts(model)
        self._scores = _check_scores(scores)
        sampler = _check_sampler(own_sampler if sampler is None else sampler)
        depth = _depth(network.network, causal_lm.backbone)
        self._candidates = make_candidates(
            layers, modes, poolings, whitenings, (network, reward), depth
        )
        tapped = sorted({n for c in self._candidates for n in c.tapped})
        self._model = EBFTModel(
            causal_lm,
            sampler,
            FeatureNetwork(layers=tapped or None, network=network.network),
            seed=self._seed,
        )
        for score in self._scores.values():
            score.prepare(causal_lm)
        slots = {layer: slot for slot, layer in enumerate(tapped)}
        self._slots = [[slots[n] for n in c.tapped] or [0] for c in self._candidates]
        self._examine = compiled(self._examined, self._model._read_variables)

    def _shown_settings(self):
        return {
            "candidates": len(self._candidates),
            "scores": list(self._scores),
            "sampler": self._model.sampler,
            "resamples": self._resamples,
            "seed": self._seed,
        }

    def __call__(self, x: Any, batch_size: int = 4) -> AuditResult:
        """Audits on documents.

        Args:
            x: documents in memory, of any form `fit` accepts, two at least; some
                that the model has not seen.
            batch_size: int, documents that are read at a time; another one draws
                other rollouts.

        Returns:
            `AuditResult`.

        Raises:
            ValueError: for documents that cannot be used, fewer than two of them,
                or none that holds a block.
        """
        batch_size = check_int("batch_size", batch_size, 1)
        rows = to_token_rows(x, self._model.causal_lm)
        count = len(rows["token_ids"])
        if count < 2:
            raise ValueError(
                "Expected at least two documents, because intervals come from drawing "
                f"documents, and one control is another's text. Received: {count}. "
                "Pass sixteen or more."
            )
        found = []
        for start in range(0, count, batch_size):
            # The last batch starts earlier and overlaps, so that all have one shape.
            first = max(min(start, count - batch_size), 0)
            batch = {n: v[first : first + batch_size] for n, v in rows.items()}
            sampled = self._sample(batch, self._seed + 2 * start)
            found.append({n: v[start - first :] for n, v in sampled.items()})
        sampled = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        if not sampled["live"].any():
            raise ValueError(
                "Expected documents that hold at least one block. Received: none in "
                f"{count} documents. Use longer documents or a smaller sampler."
            )
        controls, told_apart = control_rollouts(
            sampled["true_ids"],
            sampled["counted"],
            sampled["usable"],
            rows["token_ids"][rows["padding_mask"]],
            self._seed,
        )
        judgements = self._judge(rows, sampled, controls, batch_size)
        return self._result(sampled, judgements, told_apart)

    def _sample(self, rows, seed):
        """Rollouts of a batch and what is known of their blocks, in NumPy."""
        model = self._model
        drawn = model.rollout(rows, seed=seed)
        given = model._with_rollouts(rows, drawn)
        rollouts = model._step.replayed(*given)
        blocks = rollouts.blocks.as_tensors()
        token_ids, alive = _arrays(rollouts.token_ids, rollouts.alive)
        exists, counted, live, index = _arrays(
            blocks.true_exists, blocks.true_counted, blocks.live, blocks.true_index
        )
        batch, _, width = index.shape
        truth = np.take_along_axis(
            rows["token_ids"], index.reshape(batch, -1), axis=1
        ).reshape(index.shape)
        qualities = compare_with_truth(
            np.where(alive, token_ids, -1), truth, counted & exists
        )
        for name, score in self._scores.items():
            qualities[name] = _arrays(score(None, None, rollouts)["reward"])[0]
        stops = model._step.stop_token_ids
        # The truth can stand as a rollout if it fills its window, or says that it ends.
        last = np.max(np.where(exists, np.arange(width), 0), axis=-1)
        ended = np.isin(np.take_along_axis(truth, last[..., None], -1)[..., 0], stops)
        starts = np.zeros(live.shape, "int32")
        if blocks.starts is not None:
            (starts,) = _arrays(blocks.starts)
        return {
            **qualities,
            "token_ids": token_ids,
            "anchors": _arrays(drawn["anchors"])[0],
            "true_ids": np.where(exists, truth, stops[0] if stops else 0),
            "counted": counted & exists,
            "live": live,
            "usable": live & (exists.all(axis=-1) | ended),
            "starts": starts,
        }

    def _judge(self, rows, sampled, controls, batch_size):
        """What every candidate says of rollouts and of controls, in NumPy."""
        token_ids = np.concatenate([sampled["token_ids"], controls], axis=1)
        count, found = len(token_ids), []
        for start in range(0, count, batch_size):
            first = max(min(start, count - batch_size), 0)
            here = slice(first, first + batch_size)
            given = {"token_ids": token_ids[here], "anchors": sampled["anchors"][here]}
            batch = {name: value[here] for name, value in rows.items()}
            with no_gradient():
                said = self._examine(*self._model._with_rollouts(batch, given))
            found.append(
                [
                    {n: _arrays(v)[0][start - first :] for n, v in c.items()}
                    for c in said
                ]
            )
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*found)
        ]

    def _examined(self, documents, token_ids, anchors):
        """One reading of the frozen network, and every candidate's judgement of it."""
        step = self._model._step
        rollouts = step.replayed(documents, token_ids, anchors)
        reader = step.feature_reader
        state = reader.read(documents)
        taps = reader.taps(reader.continued(state, token_ids, rollouts.blocks))
        document_taps = reader.taps(state.outputs)
        said = []
        for candidate, slots in zip(self._candidates, self._slots):
            features = candidate.features
            generated = features.generated(
                [taps[slot] for slot in slots], rollouts.counted, rollouts.alive
            )
            target = features.target(
                [document_taps[slot] for slot in slots], rollouts.blocks
            )
            samples = self._model.sampler.num_samples
            # Controls are a block of their own, judged as rollouts are.
            parts = [
                _judged_alone(
                    candidate.reward,
                    self._advantage,
                    rollouts._replace(
                        token_ids=token_ids[:, own], alive=rollouts.alive[:, own]
                    ),
                    FrozenReading(generated[:, own], target),
                )
                for own in (slice(None, samples), slice(samples, None))
            ]
            said.append({**parts[0], "controls": parts[1]["alignment"]})
        return said

    def _result(self, sampled, judgements, told_apart):
        live = sampled["live"]
        names = (*QUALITIES, *self._scores)
        qualities = {name: _of_blocks(sampled[name], live) for name in names}
        documents = np.arange(len(live))[:, None] * 2**32 + sampled["starts"]
        rows, arrays = [], []
        for candidate, judgement in zip(self._candidates, judgements):
            signals = {name: _of_blocks(judgement[name], live) for name in SIGNALS}
            controls = _of_blocks(judgement["controls"], told_apart)
            measured = measure(
                signals,
                qualities,
                documents[live],
                (controls, documents[told_apart]),
                (self._resamples, self._seed),
            )
            rows.append(
                {**candidate.settings, "of_the_model": candidate.own, **measured}
            )
            arrays.append({name: judgement[name] for name in SIGNALS})
        return AuditResult(
            rows,
            headline=next(iter(self._scores), QUALITIES[0]),
            judged=arrays,
            qualities={name: sampled[name] for name in names},
            live=live,
            rollouts={name: sampled[name] for name in ("token_ids", "anchors")},
        )


def _judged_alone(reward, advantage, rollouts, frozen):
    """Alignment, reward and advantage of every rollout `[B, n, K]`.

    Where every token has its own, a rollout's is the mean of its tokens that count.
    """
    found = judged(reward, advantage, rollouts, frozen)
    values = {name: getattr(found, name) for name in SIGNALS}
    if len(found.mask.shape) == 3:
        return values
    count = ops.maximum(ops.sum(found.mask, axis=-1), 1.0)
    return {n: ops.sum(v * found.mask, axis=-1) / count for n, v in values.items()}


def _of_blocks(values, chosen):
    """`[N, n, K]` as `[M, n]`, the chosen of `[N, K]` blocks."""
    return np.swapaxes(values, 1, 2)[chosen]


def _arrays(*tensors):
    return [np.array(ops.convert_to_numpy(tensor)) for tensor in tensors]


def _parts(model):
    """Feature network, reward (`None` if it is another kind), advantage, sampler."""
    if not isinstance(model, EBFTModel):
        return FeatureNetwork(), None, "rloo", BlockSampler()
    if int(model._training_steps):
        raise ValueError(
            "Expected a model before training, whose frozen network is the model as it "
            f"is. Received: one trained for {int(model._training_steps)} steps. Pass "
            "model.causal_lm to audit it as a new start."
        )
    reward = model.reward if type(model.reward) is FeatureMatchingReward else None
    return model.feature_network, reward, model.advantage, model.sampler


def _depth(network, backbone):
    """Layers of the network that features come from; `None` of a callable."""
    if network is None:
        return num_layers(backbone)
    own = isinstance(network, keras_hub.models.Backbone)
    return num_layers(network) if own else None


def _check_sampler(sampler):
    check_instance(
        "sampler", sampler, BlockSampler, "Pass a keras_ebft.BlockSampler or None."
    )
    if sampler.num_samples < 2:
        raise ValueError(
            "Expected at least 2 rollouts per block, which are compared with each "
            f"other. Received: num_samples={sampler.num_samples}. Pass "
            "sampler=keras_ebft.BlockSampler(num_samples=4)."
        )
    return sampler


def _check_scores(scores):
    scores = {} if scores is None else scores
    if not isinstance(scores, dict):
        raise TypeError(
            "Expected `scores` to be a dict from names to VerifierReward objects or "
            f"functions. Received: {scores!r} (of type {type(scores).__name__}). Pass "
            'for example scores={"passes": verifier}.'
        )
    for name, score in scores.items():
        if name in QUALITIES:
            raise ValueError(
                f"Expected names of `scores` other than {list(QUALITIES)}, which are "
                f"measured anyway. Received: {name!r}. Call it something else."
            )
        if not callable(score):
            raise TypeError(
                "Expected each of `scores` to be a VerifierReward or a function of "
                f"(prompts, completions, targets). Received: {score!r} (of type "
                f"{type(score).__name__}) for {name!r}."
            )
    return {
        name: score if isinstance(score, VerifierReward) else VerifierReward(score)
        for name, score in scores.items()
    }
