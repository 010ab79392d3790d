"""Packed rows in `fit` in every form, and measurements of a model while it trains."""

import grain
import keras
import keras_hub
import numpy as np
import pytest
from helpers import VOCABULARY, documents, family, llama, randomise, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.callbacks.measure import Measure
from keras_ebft.evaluation import (
    FeatureMatching,
    TextGenerator,
    cross_entropy,
    generation,
)
from keras_ebft.evaluation.prompt_samples import can_share_prompts
from keras_ebft.evaluation.single_documents import single_documents
from keras_ebft.networks import adapters

LENGTH = 20


def packed(count=12, seed=0):
    """Pairs of random token ids in rows of `LENGTH`."""
    random = np.random.default_rng(seed)
    pairs = [
        (
            random.integers(0, VOCABULARY, random.integers(1, 8)),
            random.integers(0, VOCABULARY, random.integers(3, 14)),
        )
        for _ in range(count)
    ]
    return keras_ebft.data.pack(pairs, None, LENGTH)


def evaluate(model, rows):
    return model.evaluate(rows, batch_size=4, return_dict=True, verbose=0)


@pytest.fixture(scope="module")
def model():
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=3, context_length=2, num_samples=2
    )
    model = keras_ebft.EBFTModel(
        llama(num_layers=1),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1,)),
        ce_weight=0.1,
        seed=0,
    )
    model.compile()
    return model


FEATURE_MEASURES = (
    "feature_matching_loss",
    "whitened_feature_matching_loss",
    "alignment",
    "diversity",
    "best_alignment",
)
FORMS = {
    "arrays": lambda stream: stream.load().arrays,
    "batches": lambda stream: stream.batches(4),
    "PyDataset": lambda stream: stream.load().py_dataset(4, shuffle=False),
    "grain": lambda stream: grain.MapDataset.source(stream.load()).batch(4),
}


# Keras says so at the end of the first epoch of any data whose length it does not
# know; a stream's is known when it has been read.
UNKNOWN_LENGTH = pytest.mark.filterwarnings("ignore:Your input ran out of data")


@pytest.mark.not_on_tensorflow
@UNKNOWN_LENGTH
def test_every_form_of_packed_rows_measures_the_same(model):
    stream = packed()
    forms = {name: make(stream) for name, make in FORMS.items()}
    if keras.backend.backend() == "tensorflow":
        forms["tf.data, stream"] = stream.tf_dataset(4)
        forms["tf.data, memory"] = stream.load().tf_dataset(4)
    measured = {}
    for name, form in forms.items():
        size = {"batch_size": 4} if name == "arrays" else {}
        measured[name] = model.evaluate(form, return_dict=True, verbose=0, **size)
    for name, values in measured.items():
        assert values == pytest.approx(measured["arrays"], rel=1e-5), name


@pytest.mark.slow_compiled
@UNKNOWN_LENGTH
def test_fit_on_a_stream_reads_it_anew_every_epoch(model):
    stream = packed()
    batches = []
    counter = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: batches.append(batch)
    )
    steps = int(to_numpy(model.optimizer.iterations))
    seed = to_numpy(model._training_seed.state)
    model.fit(stream.batches(4), epochs=2, verbose=0, callbacks=[counter])
    per_epoch = -(-len(stream.load()) // 4)
    assert len(batches) == 2 * per_epoch
    # The end of a stream is no step, not even half of one.
    assert int(to_numpy(model.optimizer.iterations)) - steps == 2 * per_epoch
    drawn = to_numpy(model._training_seed.state) - seed
    assert drawn.sum() == 2 * per_epoch


def orders(model, dataset, **options):
    """The order of the rows in every epoch of `fit`."""
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(dataset.read)
    )
    model.fit(dataset, verbose=0, callbacks=[note], **options)
    return seen


def noting(dataset):
    """A `PyDataset` that keeps in `read` which rows its epoch has handed out."""

    class Noting(type(dataset)):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            self.read = [*(self.read if index else []), *batch["token_ids"].tolist()]
            return batch

    dataset.__class__ = Noting
    return dataset


@pytest.mark.not_on_tensorflow
def test_the_number_of_an_epoch_decides_the_order_of_a_py_dataset(model):
    """So that resumed training sees what it would have seen."""
    rows = packed().load()
    whole = orders(model, noting(rows.py_dataset(4, seed=3)), epochs=3)
    assert whole[0] != whole[1] != whole[2]
    resumed = noting(rows.py_dataset(4, seed=3))
    assert orders(model, resumed, initial_epoch=1, epochs=3) == whole[1:]
    # The same data set again, as in a second call of `fit`: in yet another order.
    again = orders(model, resumed, epochs=1)
    assert again[0] not in whole
    assert sorted(again[0]) == sorted(whole[0])


def test_a_shuffled_py_dataset_measures_the_same_every_time(model):
    dataset = packed().load().py_dataset(4, seed=3)
    first, second = (model.evaluate(dataset, verbose=0) for _ in range(2))
    assert first == second


class OwnOrder:
    """A source of one's own that is told which epoch it is in."""

    def __init__(self, rows):
        self.rows = rows
        self.epoch = None
        self.epochs_read = []

    def begin_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.epochs_read.append(self.epoch)
        yield {name: values[:4] for name, values in self.rows.items()}


@UNKNOWN_LENGTH
def test_any_source_may_ask_for_the_number_of_the_epoch(model):
    source = OwnOrder(packed().load().arrays)
    model.fit(source, epochs=1, verbose=0)
    first = model.training_state.first_pass
    model.fit(source, initial_epoch=1, epochs=3, verbose=0)
    # Once before training, for what the batches are like: always the first pass.
    assert source.epochs_read == [0, first, 0, first + 1, first + 2]


def test_single_documents_undo_packing():
    stream = packed()
    rows = stream.load().arrays
    apart = single_documents(rows)
    assert len(apart["token_ids"]) == 12
    found = sorted(
        tuple(ids[mask]) for ids, mask in zip(apart["token_ids"], apart["padding_mask"])
    )
    expected = sorted(tuple(np.concatenate(pair)) for pair in stream._documents)
    assert found == expected
    answers = sorted(
        tuple(ids[mask]) for ids, mask in zip(apart["token_ids"], apart["answer_mask"])
    )
    assert answers == sorted(tuple(answer) for _, answer in stream._documents)


def test_cross_entropy_by_hand(model):
    """Against log-probabilities of each document in a row of its own."""
    pairs = packed()._documents
    ids = np.zeros((len(pairs), LENGTH), "int32")
    for row, pair in zip(ids, pairs):
        whole = np.concatenate(pair)
        row[: len(whole)] = whole
    mask = np.ones_like(ids)
    logits = model.causal_lm({"token_ids": ids, "padding_mask": mask})
    log_prob = to_numpy(ops.log_softmax(logits, axis=-1))
    losses, answer_losses = [], []
    for row, scores, (prompt, answer) in zip(ids, log_prob, pairs):
        size = len(prompt) + len(answer)
        found = -scores[np.arange(size - 1), row[1:size]]
        losses.extend(found)
        answer_losses.extend(found[len(prompt) - 1 :])
    measured = cross_entropy(model, packed().load().arrays, batch_size=5)
    assert measured["cross_entropy"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert measured["answer_cross_entropy"] == pytest.approx(
        np.mean(answer_losses), rel=1e-5
    )
    assert measured["tokens"] == len(losses)
    assert measured["answer_tokens"] == len(answer_losses)
    evaluated = evaluate(model, packed().load().arrays)
    assert measured["answer_cross_entropy"] == pytest.approx(
        evaluated["ce_loss"], rel=1e-5
    )


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs op by op")
def test_measuring_again_compiles_nothing():
    """While training, `Measure` asks for it after every epoch."""
    causal_lm = llama(num_layers=1)
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.SGD(0.1))
    traces, found = [], []
    layer = causal_lm.backbone.token_embedding
    call = layer.call

    def counting(*args, **kwargs):
        traces.append(1)
        return call(*args, **kwargs)

    layer.call = counting
    x = documents(4, LENGTH)

    def measure(of):
        before = len(traces)
        found.append(cross_entropy(of, x, batch_size=2)["cross_entropy"])
        traces_of_each.append(len(traces) - before)
        return {"own": found[-1]}

    traces_of_each = []
    model.fit(x, batch_size=4, epochs=3, callbacks=[Measure(measure)], verbose=0)
    assert traces_of_each[0] > 0
    assert traces_of_each[1:] == [0, 0]
    # It is the weights of the moment that are measured.
    assert found[2] < found[1] < found[0]
    # Adapters that are switched off are another program.
    causal_lm.backbone.enable_lora(2)
    adapted = adapters.adapted_layers(causal_lm.backbone)
    for one in adapted:
        one.lora_kernel_b.assign(np.ones(one.lora_kernel_b.shape))
    on = cross_entropy(causal_lm, x, batch_size=2)["cross_entropy"]
    with adapters.switched_off(adapted):
        off = cross_entropy(causal_lm, x, batch_size=2)["cross_entropy"]
    assert off == pytest.approx(found[2], rel=1e-5)
    assert abs(on - off) > 1e-3


def test_without_answers_all_tokens_are_one_number(model):
    measured = cross_entropy(model, documents(3, LENGTH), batch_size=5)
    assert set(measured) == {"cross_entropy", "perplexity", "tokens"}
    assert measured["tokens"] == 3 * (LENGTH - 1)


@pytest.mark.parametrize(
    "x, message",
    [
        (np.zeros((2, 1), "int32"), "token before it"),
        ({"token_ids": np.full((1, 4), VOCABULARY)}, "vocabulary"),
    ],
)
def test_cross_entropy_refuses(model, x, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(model, x)


def test_another_kind_of_model():
    with pytest.raises(TypeError, match=r"EBFTModel or a keras_hub CausalLM.*'gpt'"):
        cross_entropy("gpt", documents(2, 8))


def test_feature_matching(model):
    """At the sampler's own length what `evaluate` says, from the same network."""
    measure = FeatureMatching(model, rollout_lengths=(2, 5), seed=0)
    for length in (2, 5):
        assert measure._models[length].frozen_network is model.frozen_network
    del measure._models[5]
    rows = packed().load().arrays
    measured = measure(rows, batch_size=4)
    evaluated = evaluate(model, rows)
    unbiased = measured.pop("unbiased_feature_matching_loss@2")
    # Less than the plain one by a variance.
    assert unbiased < measured["feature_matching_loss@2"]
    again = measure(rows, batch_size=4)
    assert again == {**measured, "unbiased_feature_matching_loss@2": unbiased}
    for name in ("ce_loss", "perplexity"):
        assert measured.pop(name) == pytest.approx(evaluated[name], rel=1e-5)
    assert set(measured) == {f"{name}@2" for name in FEATURE_MEASURES}
    for name in FEATURE_MEASURES:
        assert measured[f"{name}@2"] == pytest.approx(evaluated[name], rel=1e-5)
    # Measuring changes nothing of what training measures.
    assert "unbiased_feature_matching_loss" not in evaluated


@pytest.mark.slow
def test_feature_matching_at_several_lengths(model):
    measure = FeatureMatching(model.causal_lm, rollout_lengths=(2, 8), num_samples=3)
    measured = measure(documents(4, 24), batch_size=4)
    names = (*FEATURE_MEASURES, "unbiased_feature_matching_loss")
    expected = {f"{n}@{g}" for n in names for g in (2, 8)}
    assert set(measured) == expected | {"ce_loss", "perplexity"}
    assert np.isfinite(list(measured.values())).all()
    # Late tokens of a longer rollout have less to go by.
    assert measured["alignment@8"] != measured["alignment@2"]


def test_feature_matching_refuses(model):
    with pytest.raises(ValueError, match="at least one"):
        FeatureMatching(model, rollout_lengths=())
    with pytest.raises(TypeError, match=r"tuple of ints.*rollout_lengths=8"):
        FeatureMatching(model, rollout_lengths=8)
    with pytest.raises(ValueError, match="rollout_lengths=0"):
        FeatureMatching(model, rollout_lengths=(0,))
    with pytest.raises(ValueError, match="num_samples=0"):
        FeatureMatching(model, num_samples=0)


def test_measure_adds_to_the_history(model):
    rows = packed().load().arrays
    seen = []

    def measure(of):
        seen.append(cross_entropy(of, rows, batch_size=5)["answer_cross_entropy"])
        return {"own": seen[-1]}

    visible = []
    later = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: visible.append("val_own" in logs)
    )
    history = model.fit(
        rows,
        batch_size=4,
        epochs=2,
        validation_data=rows,
        callbacks=[Measure(measure, every=2), later],
        verbose=0,
    ).history
    assert history["val_own"] == seen
    assert visible == [False, True]
    # The weights measured are those of the epoch.
    assert seen == pytest.approx(history["val_ce_loss"][1::2], rel=1e-5)


def test_measure_refuses(model):
    with pytest.raises(TypeError, match="'loss'"):
        Measure("loss")
    with pytest.raises(ValueError, match="every=0"):
        Measure(print, every=0)
    callback = Measure(lambda of: {"loss": 1.0}, prefix="")
    with pytest.raises(ValueError, match=r"\['loss'\].*prefix"):
        model.fit(packed().load().arrays, batch_size=4, callbacks=[callback], verbose=0)


@pytest.fixture(scope="module")
def reader():
    """A Llama that reads and writes bytes."""
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(["ab ab"], 262)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=24
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)


def test_a_tokenizer_of_ones_own():
    texts = ["def f(x):\n    return x\n"] * 2
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(texts, 270)
    assert tokenizer.vocabulary_size() == 270
    ids = np.array(tokenizer(texts[0]))
    assert len(ids) < len(texts[0])
    assert tokenizer.detokenize(ids) == texts[0]
    with pytest.raises(ValueError, match="at least 262"):
        keras_ebft.data.train_byte_pair_tokenizer(texts, 261)
    with pytest.raises(ValueError, match="more text"):
        keras_ebft.data.train_byte_pair_tokenizer(["a"], 270)


def test_completions(reader):
    prompts = ["ab", "abc", "b"]
    kept = object()
    reader.sampler, reader.generate_function = kept, None
    sample = TextGenerator(reader, 12, num_samples=2, temperature=1.0, batch_size=4)
    found = sample(prompts)
    assert [len(texts) for texts in found] == [2, 2, 2]
    assert found[0][0] != found[0][1]
    assert sample(prompts) == found
    assert reader.sampler is kept
    assert reader.generate_function is None
    greedy = TextGenerator(reader, 12, batch_size=2)
    first = greedy(prompts)
    # The same whatever stands beside it in a batch.
    assert [greedy([prompt])[0] for prompt in prompts] == first
    compiled = greedy._generate_function
    reader.backbone.set_weights([w * 0 + 0.1 for w in reader.backbone.get_weights()])
    greedy(prompts)
    assert greedy._generate_function is compiled


def by_either_engine(causal_lm, prompts, monkeypatch, **options):
    """Texts by block-parallel sampling, and by KerasHub's `generate`."""
    options = {"num_samples": 2, "temperature": 1e-4, "batch_size": 4, **options}
    shared = TextGenerator(causal_lm, 12, **options)(prompts)
    with monkeypatch.context() as patched:
        patched.setattr(generation, "can_share_prompts", lambda *_: False)
        return shared, TextGenerator(causal_lm, 12, **options)(prompts)


@pytest.mark.not_on_tensorflow
def test_samples_that_share_their_prompt_are_those_of_generate(reader, monkeypatch):
    """At a temperature that leaves one token; prompts of any length, and the end."""
    prompts = ["ab", "abcdefghi", "b", "abc", "abcdefghijklmnop"]
    kept = reader.backbone.get_weights()
    end = reader.preprocessor.tokenizer.end_token_id
    table = reader.backbone.token_embedding.reverse_embeddings
    try:
        randomise(reader, scale=1.0)
        table.assign(100.0 * to_numpy(table))
        shared, generated = by_either_engine(reader, prompts, monkeypatch)
        assert shared == generated
        assert max(len(text) for texts in shared for text in texts) > 2
        cut = by_either_engine(reader, prompts, monkeypatch, max_new_tokens=2)
        assert cut == ([[text[:2] for text in texts] for texts in shared],) * 2
        lengths = {len(text) for texts in shared for text in texts}
        assert len(lengths) > 2 and 0 in lengths
        # A letter that "ab" goes on with becomes the end.
        first = shared[0][0][0]
        letter = next(c for c in shared[0][0] if c.isascii() and c != first)
        token = int(reader.preprocessor.tokenizer(letter)[0])
        columns = to_numpy(table).copy()
        columns[:, [end, token]] = columns[:, [token, end]]
        table.assign(columns)
        ended, generated = by_either_engine(reader, prompts, monkeypatch)
        assert ended == generated
        assert 0 < len(ended[0][0]) < len(shared[0][0])
    finally:
        reader.backbone.set_weights(kept)


def test_positions_that_were_not_learned_are_left_to_generate(reader):
    assert can_share_prompts(reader, 10**6)
    learned = family("GPT2")
    assert can_share_prompts(learned, learned.backbone.max_sequence_length)
    assert not can_share_prompts(learned, learned.backbone.max_sequence_length + 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 2}, "temperature above 0"),
        ({"max_length": 1}, "max_length=1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_text_generator_refuses(reader, options, message):
    with pytest.raises(ValueError, match=message):
        TextGenerator(reader, **{"max_length": 8, **options})


def test_text_generator_needs_strings(reader):
    with pytest.raises(ValueError, match="preprocessor"):
        TextGenerator(llama(num_layers=1), 8)
    with pytest.raises(ValueError, match="at least one prompt"):
        TextGenerator(reader, 8)([])
