"""What the study measures of a model: answers, likelihood, features, distance."""

import math
import time

import numpy as np
from keras import ops

import keras_ebft
from keras_ebft.backend.runtime import compiled, no_gradient
from keras_ebft.evaluation import FeatureMatching, TextGenerator
from keras_ebft.evaluation.single_documents import single_documents
from keras_ebft.networks import to_numpy


class Answers:
    """Greedy answers and likelihood of documents of a task.

    The first measurement of a part keeps its probabilities, and later ones say how far
    they are from these.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        task: `study_tasks.Task`.
        settings: dict, `evaluation` of a plan.
    """

    def __init__(self, causal_lm, task, settings):
        self.causal_lm, self.task, self.settings = causal_lm, task, settings
        self.tokenizer = causal_lm.preprocessor.tokenizer
        prompts = [p for pairs in task.parts.values() for p, _ in pairs]
        longest = max(len(tokens) for tokens in self.tokenizer(prompts))
        self._max_length = longest + task.answer_tokens + 2
        # Programs are kept in them: one for every kind of generation.
        self._generators = {}
        self._first = {}

        def logits(token_ids, padding_mask):
            return causal_lm({"token_ids": token_ids, "padding_mask": padding_mask})

        self._logits = compiled(logits, lambda: causal_lm.variables)

    def write(self, pairs, samples=1, temperature=0.0):
        """Texts of every document, and their scores; lists of lists."""
        key = samples, temperature
        if key not in self._generators:
            self._generators[key] = TextGenerator(
                self.causal_lm,
                max_length=self._max_length,
                num_samples=samples,
                temperature=temperature,
                batch_size=self.settings["batch_size"],
            )
        written = self._generators[key]([prompt for prompt, _ in pairs])
        scores = [
            [self.task.verify(prompt, text) for text in texts]
            for (prompt, _), texts in zip(pairs, written)
        ]
        return written, scores

    def likelihood(self, part, pairs):
        """Cross-entropy, entropy and divergence from the first time.

        All at answer tokens, with the true tokens before them, in nats per token.
        """
        first_time = part not in self._first
        kept = self._first.setdefault(part, [])
        losses, counts, entropies, divergences = [], [], [], []
        documents = answer_log_probs(self._logits, pairs, self.tokenizer)
        for index, (log_probs, tokens) in enumerate(documents):
            losses.append(-log_probs[np.arange(len(tokens)), tokens].mean())
            counts.append(len(tokens))
            entropies.append(-(np.exp(log_probs) * log_probs).sum())
            if index >= self.settings["distance_documents"]:
                continue
            if first_time:
                kept.append(log_probs)
            away = np.exp(log_probs) * (log_probs - kept[index])
            divergences.append((away.sum(), len(tokens)))
        away, tokens = np.sum(divergences, axis=0)
        return {
            "losses": losses,
            "cross_entropy": float(np.average(losses, weights=counts)),
            "entropy": float(np.sum(entropies) / np.sum(counts)),
            "kl_from_base": float(away / tokens),
        }


class Judge(Answers):
    """Measures a language model on parts of a task, always in the same way.

    Made while the model is the base, whose features it keeps.

    Args:
        causal_lm: `keras_hub.models.CausalLM`.
        task: `study_tasks.Task`.
        settings: dict, `evaluation` of a plan.
        length: int, tokens per row.
    """

    def __init__(self, causal_lm, task, settings, length):
        super().__init__(causal_lm, task, settings)
        self._length = length
        sampler = keras_ebft.BlockSampler(**settings["sampler"])
        self._features = FeatureMatching(
            keras_ebft.EBFTModel(causal_lm, sampler, seed=0),
            rollout_lengths=settings["rollout_lengths"],
            num_samples=settings["feature_samples"],
        )

    def __call__(self, part, whole):
        """Measures a part.

        Args:
            part: str.
            whole: bool, whether to measure what a choice of learning rates does not
                need: samples, features, distance.

        Returns:
            dict of floats, and of lists of one value per document in `per_document`.
        """
        start = time.process_time()
        pairs = self.task.parts[part]
        written, scores = self.write(pairs)
        likelihood = self.likelihood(part, pairs)
        per_document = {
            "greedy": [score for (score,) in scores],
            "cross_entropy": likelihood.pop("losses"),
        }
        measured = {
            "greedy": float(np.mean(per_document["greedy"])),
            **likelihood,
            "written": [texts[0] for texts in written[:3]],
        }
        if whole:
            measured |= self._samples(pairs, per_document)
            measured |= self._feature_matching(pairs)
        return {
            **measured,
            "per_document": {k: _rounded(v) for k, v in per_document.items()},
            "measuring_cpu_seconds": round(time.process_time() - start, 1),
        }

    def _samples(self, pairs, per_document):
        settings = self.settings
        _, scores = self.write(pairs, settings["samples"], settings["temperature"])
        per_document["sampled"] = [float(np.mean(s)) for s in scores]
        measured = {"sampled": float(np.mean(per_document["sampled"]))}
        for k in settings["k"]:
            measured[f"best@{k}"] = float(
                np.mean([expected_best(s, k) for s in scores])
            )
        return measured

    def _feature_matching(self, pairs):
        rows = pack(pairs, self.tokenizer, self._length)
        rows = first(rows, self.settings["feature_rows"])
        found = self._features(rows, batch_size=4)
        return {
            name: value
            for name, value in found.items()
            if name.startswith(("unbiased_feature", "alignment"))
        }


def expected_best(scores, k):
    """The expected best of k of n scores, drawn without replacement.

    Of scores that are 0 or 1 that is pass@k (Chen et al., 2021).

    Raises:
        ValueError: if there are fewer scores than k.
    """
    count = len(scores)
    if not 1 <= k <= count:
        raise ValueError(
            f"Expected k from 1 to {count}, the number of samples. Received: k={k}."
        )
    ways = [math.comb(place, k - 1) for place in range(count)]
    return float(np.dot(ways, np.sort(scores)) / math.comb(count, k))


def pack(pairs, tokenizer, length):
    """Packed rows of pairs, in order; a dict of arrays.

    Raises:
        ValueError: if a document is longer than a row.
    """
    stream = keras_ebft.data.pack(
        pairs, tokenizer, length, strategy="in_order", long_documents="drop"
    ).load()
    if stream.report.dropped_documents:
        raise ValueError(
            f"Expected documents of at most {length} tokens. Received: "
            f"{stream.report.dropped_documents} longer ones. Raise the plan's `length`."
        )
    return stream.arrays


def first(rows, count):
    """The first rows of a dict of arrays."""
    return {name: values[:count] for name, values in rows.items()}


def answer_log_probs(logits_of, pairs, tokenizer, batch_size=8):
    """For every document, log-probabilities at its answer tokens and the tokens.

    Args:
        logits_of: function of token ids and padding mask to logits.
        pairs: list of prompts and answers.
        tokenizer: of the model.
        batch_size: int, documents per forward pass.

    Yields:
        float32 `[A, vocabulary]` and int32 `[A]`, at temperature 1 and with the true
        tokens before.
    """
    longest = max(sum(map(len, tokenizer(list(pair)))) for pair in pairs) + 2
    # A multiple of 16: parts then share a program.
    length = -(-longest // 16) * 16
    rows = single_documents(pack(pairs, tokenizer, length))
    rows = {name: _wide(values, length) for name, values in rows.items()}
    for start in range(0, len(pairs), batch_size):
        batch = {
            name: value[start : start + batch_size] for name, value in rows.items()
        }
        size = len(batch["token_ids"])
        inputs = [
            ops.convert_to_tensor(np.resize(batch[name], (batch_size, length)))
            for name in ("token_ids", "padding_mask")
        ]
        with no_gradient():
            logits = to_numpy(logits_of(*inputs))[:size, :-1]
        for row, ids, answers in zip(logits, batch["token_ids"], batch["answer_mask"]):
            yield _log_softmax(row[answers[1:]]), ids[1:][answers[1:]]


def _wide(values, length):
    return np.pad(values, ((0, 0), (0, length - values.shape[1])))


def _log_softmax(logits):
    logits = logits.astype("float32")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _rounded(values):
    return [round(float(value), 5) for value in values]


def token_passes(model, length, batch_size):
    """How many tokens one training step passes through the whole network.

    A backward pass counts as two forward passes. Attention, sampling and the output
    head are not counted on their own.

    Args:
        model: `EBFTModel`.
        length: int, tokens per row.
        batch_size: int, rows per step.

    Returns:
        float.
    """
    document = 3.0 * length
    if not model.objective.needs_rollouts:
        return batch_size * document
    sampler = model.sampler
    blocks = sampler.num_anchors or sampler.geometry(length).num_blocks
    rollouts = sampler.num_samples * blocks * sampler.rollout_length
    # Drawn once, read once more with gradient.
    passes = document + 4.0 * rollouts
    if model.reward.needs_features:
        depth = model.causal_lm.backbone.num_layers
        share = max(model.feature_network.tapped_layers(depth)) / depth
        passes += share * (length + rollouts)
    if model.objective.needs_reference:
        passes += length + rollouts
    return batch_size * passes
