"""White-box methods of `EBFTModel`, for notebooks, tests and analysis."""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import keras_hub
from keras import ops

from keras_ebft.backend.runtime import compiled, no_gradient
from keras_ebft.inspection.completions import completion_records
from keras_ebft.layout.documents import Documents, read_documents
from keras_ebft.layout.draws import draw_numbers
from keras_ebft.networks import to_numpy
from keras_ebft.objectives.objective import Objective
from keras_ebft.records import LossTerms, Rollouts
from keras_ebft.samplers import BlockSampler
from keras_ebft.step import EBFTStep
from keras_ebft.training.batches import Reader
from keras_ebft.training.token_rows import check_anchors, to_rollouts
from keras_ebft.typing import Tensor

# Tensors by name.
Tensors: TypeAlias = dict[str, Tensor]
# What `draw_numbers` returns.
Numbers: TypeAlias = tuple[Tensor, Tensor | None]
REWARD_NAMES = ("alignment", "diversity", "reward", "advantage")


class Inspection:
    """Each part of a step on its own. Every method reads the documents anew.

    `x` is documents in memory, of any form `fit` accepts. `rollouts` is what
    `rollout` returned, or an int array `[B, n, K, G]`. All raise what `fit`
    raises for unusable documents, `TypeError` for rollouts that are not integers, and
    `ValueError` for rollouts of a wrong shape, with ids outside the vocabulary or
    anchors outside the documents, or, with random anchors, without their anchors.
    """

    # What the model has that this is a part of.
    causal_lm: keras_hub.models.CausalLM
    sampler: BlockSampler
    objective: Objective
    _reader: Reader
    _compiled: dict[str, Callable[..., Any]]
    _inspection_seed: keras.random.SeedGenerator
    _training_steps: keras.Variable

    def rollout(self, x: Any, seed: int | None = None) -> Tensors:
        """Samples rollouts.

        Args:
            x: documents.
            seed: int, or `None` for numbers that differ from call to call.

        Returns:
            dict of `token_ids` int32 and `log_prob` float32 `[B, n, K, G]`, in
            nats at the sampling temperature; `mask` bool `[B, n, K, G]`, tokens
            that count; `alive` bool `[B, n, K, G]`, tokens up to and with a stop
            token, whether they count or not; `true_exists` bool `[B, K, G]`, tokens
            whose true ones are there; and `anchors` int32 `[B, K]`, -1 for dead
            blocks.

        Example:
        ```python
        rollouts = model.rollout(texts, seed=0)
        model.rewards(texts, rollouts)["reward"]
        ```
        """
        documents = self._in_memory(x)
        seed = self._inspection_seed if seed is None else seed
        with no_gradient():
            numbers = draw_numbers(self.sampler, documents, seed)
            return self._compiled["rollout"](documents, numbers)

    def score(self, x: Any, rollouts: Any) -> Tensors:
        """Log-probabilities of rollouts and documents, with gradient.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of `log_prob` and `entropy` `[B, n, K, G]`, at the sampling
            temperature, and `document_log_prob` `[B, T - 1]`, at temperature 1;
            float32, nats.
        """
        return self._compiled["score"](*self._with_rollouts(x, rollouts))

    def features(self, x: Any, rollouts: Any) -> tuple[Tensor, Tensor]:
        """Features of rollouts and of the true continuations.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            `(generated, target)`: float32 `[B, n, K, F, D]` and `[B, K, F, D]`;
            with `"token"` pooling `[B, n, K, G, F, D]` and `[B, K, G, F, D]`.
        """
        self._refuse_without_rollouts()
        with no_gradient():
            return self._compiled["features"](*self._with_rollouts(x, rollouts))

    def rewards(self, x: Any, rollouts: Any) -> Tensors:
        """Rewards and advantages of rollouts.

        Args:
            x: documents.
            rollouts: rollouts of these documents.

        Returns:
            dict of float32 `[B, n, K]`: `alignment`, `diversity`, `reward` and
            `advantage`, 0 in dead blocks; `[B, n, K, G]` with `"token"` pooling.
        """
        self._refuse_without_rollouts()
        with no_gradient():
            return self._compiled["rewards"](*self._with_rollouts(x, rollouts))

    def completions(self, x: Any, seed: int | None = None) -> list[dict[str, Any]]:
        """What the model writes in every block, with its reward, to be read.

        Args:
            x: documents.
            seed: int, or `None` for rollouts that differ from call to call.

        Returns:
            list of dicts that JSON can hold, one per live block: `row` and `anchor`,
            ints; `prompt`, what the block sees of its document, and `truth`, how the
            document goes on, strings; and `rollouts`, one dict per sample:

                - `text`, a string;
                - `alignment`, `diversity`, `reward`, `advantage`: floats, with
                    `"token"` pooling lists of one per token; `None` for what is not
                    finite;
                - `tokens`, a list of strings that make up the text and its markers,
                    and `log_prob`, as many floats, in nats at the sampling
                    temperature;
                - `ended`, whether it wrote a stop token; `None` where there are none.

                Start and end tokens are in `tokens` alone. Of a model without a
                preprocessor texts are lists of token ids.

        Raises:
            ValueError: also for a model that does not learn from rollouts.

        Example:
        ```python
        for block in model.completions(texts, seed=0):
            print(block["truth"], [rollout["text"] for rollout in block["rollouts"]])
        ```
        """
        self._refuse_without_rollouts()
        documents = self._in_memory(x)
        seed = self._inspection_seed if seed is None else seed
        with no_gradient():
            numbers = draw_numbers(self.sampler, documents, seed)
            found = self._compiled["completions"](documents, numbers)
        arrays = {name: to_numpy(value) for name, value in found.items()}
        arrays["document"] = to_numpy(documents.token_ids)
        return completion_records(arrays, self.causal_lm)

    def check_completions(self, x: Any) -> None:
        """Raises what `completions` raises, before anything is computed."""
        self._refuse_without_rollouts()
        self._in_memory(x)

    def loss_terms(self, x: Any, rollouts: Any) -> Tensors:
        """The terms of the loss and their weighted sum, with gradient.

        Args:
            x: documents.
            rollouts: rollouts of these documents; not looked at by a model that
                learns from documents alone.

        Returns:
            dict of float32 scalars: `ce_loss`, with rollouts `policy_loss` and
            `entropy`, with a reference `kl`, with a critic `critic_loss` and
            `critic_accuracy`; and `loss`, as the next training step would weigh
            them.
        """
        if self.objective.needs_rollouts:
            given = self._with_rollouts(x, rollouts)
        else:
            given = (self._in_memory(x), None, None)
        terms = self._compiled["loss_terms"](*given)
        loss = self.objective.loss(LossTerms(**terms), self._training_steps)
        return {**terms, "loss": loss}

    def _refuse_without_rollouts(self) -> None:
        if not self.objective.needs_rollouts:
            raise ValueError(
                "Expected a model that learns from rollouts, and so has a feature "
                "network. Received: one whose only weight is `ce_weight`. Build an "
                "EBFTModel with `policy_weight` on the same CausalLM."
            )

    def _in_memory(self, x: Any) -> Documents:
        rows = self._reader.read(x)
        return read_documents(
            {name: ops.convert_to_tensor(value) for name, value in rows.items()}
        )

    def _with_rollouts(
        self, x: Any, rollouts: Any
    ) -> tuple[Documents, Tensor, Tensor | None]:
        """`(documents, token ids, anchors)`, checked against each other."""
        documents = self._in_memory(x)
        token_ids, anchors = to_rollouts(rollouts, self.causal_lm)
        if anchors is not None:
            check_anchors(anchors, documents.token_ids.shape)
            anchors = ops.convert_to_tensor(anchors.astype("int32"))
            num_blocks = anchors.shape[1]
        elif self.sampler.draws_anchors and documents.anchors is None:
            raise ValueError(
                "Expected the anchors of rollouts that stand at random places. "
                "Received: token ids alone. Pass what `rollout` returned."
            )
        else:
            num_blocks = self.sampler.num_blocks(documents)
        batch = documents.token_ids.shape[0]
        shape = token_ids.shape
        fits = (batch, num_blocks, self.sampler.rollout_length)
        if len(shape) != 4 or (shape[0], *shape[2:]) != fits:
            raise ValueError(
                "Expected rollouts of shape [B, n, K, G] = "
                f"[{batch}, n, {fits[1]}, {fits[2]}] for these documents and "
                f"this sampler. Received: shape {shape}."
            )
        return documents, ops.convert_to_tensor(token_ids.astype("int32")), anchors


def compile_stages(
    step: EBFTStep, variables: Callable[[], list[keras.Variable]]
) -> dict[str, Callable[..., Any]]:
    """The stages of a step as functions of tensors, compiled where it pays.

    Args:
        step: `EBFTStep`.
        variables: function without arguments that returns all variables.

    Returns:
        dict of functions.
    """

    def rollout(documents: Documents, numbers: Numbers) -> Tensors:
        return _sampled(step, documents, numbers)[1]

    def completions(documents: Documents, numbers: Numbers) -> Tensors:
        rollouts, sampled = _sampled(step, documents, numbers)
        return sampled | _judged(step, rollouts) | _told_apart(rollouts)

    def score(documents: Documents, token_ids: Tensor, anchors: Tensor) -> Tensors:
        state = step.read(documents)
        scores = step.score_rollouts(
            state, step.replayed(documents, token_ids, anchors)
        )
        document_scores = step.score_documents(state, documents)
        return {**scores._asdict(), "document_log_prob": document_scores.log_prob}

    def features(
        documents: Documents, token_ids: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor]:
        rollouts = step.replayed(documents, token_ids, anchors)
        frozen = step.read_frozen(rollouts, with_reference=False)
        return frozen.generated, frozen.target

    def rewards(documents: Documents, token_ids: Tensor, anchors: Tensor) -> Tensors:
        return _judged(step, step.replayed(documents, token_ids, anchors))

    def loss_terms(documents: Documents, token_ids: Tensor, anchors: Tensor) -> Tensors:
        experience = None
        if token_ids is not None:
            experience = step.experience_of(
                step.replayed(documents, token_ids, anchors)
            )
        return step(documents, None, experience).terms.measured()

    stages = (rollout, score, features, rewards, completions, loss_terms)
    return {stage.__name__: compiled(stage, variables) for stage in stages}


def _sampled(
    step: EBFTStep, documents: Documents, numbers: Numbers
) -> tuple[Rollouts, Tensors]:
    """`Rollouts`, and what `Inspection.rollout` returns of them."""
    state = step.read(documents)
    rollouts = step.sample(documents, state, numbers)
    log_prob = rollouts.log_prob
    if log_prob is None:
        log_prob = step.score_rollouts(state, rollouts).log_prob
    return rollouts, {
        "token_ids": rollouts.token_ids,
        "log_prob": log_prob,
        "mask": rollouts.counted,
        "alive": rollouts.alive,
        "true_exists": rollouts.blocks.true_exists,
        "anchors": rollouts.blocks.absolute_anchors(),
    }


def _judged(step: EBFTStep, rollouts: Rollouts) -> Tensors:
    judged = step.judge(rollouts, step.read_frozen(rollouts, with_reference=False))
    return {name: getattr(judged, name) for name in REWARD_NAMES}


def _told_apart(rollouts: Rollouts) -> Tensors:
    """What of a row is prompt and what truth, and where rollouts end."""
    blocks = rollouts.blocks.as_tensors()
    found = {"true_index": blocks.true_index}
    if blocks.starts is not None:
        found["starts"] = blocks.starts
    if rollouts.ended is not None:
        found["ended"] = rollouts.ended
    return found
