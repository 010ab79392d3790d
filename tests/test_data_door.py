"""One door for data: the same documents mean the same, whichever way they come in."""

import io
import itertools
import logging
import tracemalloc

import helpers
import keras
import keras_hub
import numpy as np
import pytest
from helpers import documents, llama, set_random_seed, to_numpy

import keras_ebft
from keras_ebft.data.documents import DocumentTokenizer
from keras_ebft.evaluation import cross_entropy
from keras_ebft.training.data_report import DataReport
from keras_ebft.training.token_rows import to_token_rows

# What is read is NumPy's on every backend.
pytestmark = [
    pytest.mark.on_torch,
    # What Keras says of every generator.
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
]

IDS = documents(2, 12)
ROLLOUTS = np.zeros((2, 2, 2, 3), "int32")


def build(causal_lm, **options):
    sampler = keras_ebft.BlockSampler(
        rollout_length=3, stride=4, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(causal_lm, sampler, network, seed=0, **options)
    model.compile(keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def model():
    return build(llama(num_layers=1))


@pytest.fixture(scope="module")
def reader(byte_lm):
    """A model that reads strings, and finds some tokens likelier than others."""
    embeddings = byte_lm.backbone.token_embedding.embeddings
    before = to_numpy(embeddings)
    embeddings.assign(30 * before)
    yield build(byte_lm)
    embeddings.assign(before)


class Batches(keras.utils.PyDataset):
    """One batch as a Keras data set."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


WAYS = {
    "fit": lambda model, x: model.fit(x, verbose=0),
    "fit on batches": lambda model, x: model.fit(iter([x]), verbose=0),
    "PyDataset": lambda model, x: model.fit(Batches(x), verbose=0),
    "validation": lambda model, x: model.fit(IDS, validation_data=x, verbose=0),
    "validation_split": lambda model, x: model.fit(x, validation_split=0.5, verbose=0),
    "evaluate": lambda model, x: model.evaluate(x, verbose=0),
    "train_on_batch": lambda model, x: model.train_on_batch(x),
    "test_on_batch": lambda model, x: model.test_on_batch(x),
    "rollout": lambda model, x: model.rollout(x),
    "score": lambda model, x: model.score(x, ROLLOUTS),
    "features": lambda model, x: model.features(x, ROLLOUTS),
    "rewards": lambda model, x: model.rewards(x, ROLLOUTS),
    "loss_terms": lambda model, x: model.loss_terms(x, ROLLOUTS),
    "cross_entropy": cross_entropy,
}


def masked(values):
    return {"token_ids": IDS, "padding_mask": np.array(values)}


def with_segments(first):
    segments = np.ones((2, 12), "int64")
    segments[:, :6] = first
    return {"token_ids": IDS, "segment_ids": segments}


ONES = np.ones((2, 12))
REFUSED = {
    "ids below 0": (np.full((2, 12), -1), ValueError, "-1 to -1"),
    "floats": (IDS + 0.5, TypeError, "float64"),
    "a mask of NaN": (masked(ONES * np.nan), ValueError, r"padding_mask.*nan"),
    "half a mask": (masked(ONES / 2), ValueError, r"padding_mask.*0\.5"),
    "a mask below 0": (masked(-ONES), ValueError, "padding_mask.*-1"),
    "a mask of text": (masked(np.full((2, 12), "0")), TypeError, "padding_mask.*<U1"),
    "holes": (masked(ONES * (np.arange(12) != 5)), ValueError, "right"),
    "left padding": (masked(ONES * (np.arange(12) > 5)), ValueError, "right"),
    "segments that int32 merges": (with_segments(2**32 + 1), ValueError, "segment_ids"),
    "segments below 0": (with_segments(-1), ValueError, "segment_ids.*-1 to 1"),
    "half an answer": (
        {"token_ids": IDS, "answer_mask": ONES / 2},
        ValueError,
        r"answer_mask.*0\.5",
    ),
    "unequal rows": (
        {"token_ids": [[1, 2], [3]]},
        ValueError,
        "`token_ids`.*unequal lengths",
    ),
    "NaN among texts": (["text", float("nan")], TypeError, "document 1, nan"),
    "a number among texts": (["text", 3], TypeError, r"document 1, 3 .*int"),
    "nothing among texts": (["text", None], TypeError, "document 1, None"),
    "nothing in a pair": ([("text", None)], TypeError, "document 0, None"),
    "pairs in an array": (np.array([("a", "b")] * 2), ValueError, "list of tuples"),
    "one text": ("one text", TypeError, "several documents.*'one text'"),
    "documents that int32 wraps": (
        [np.array([2**32 + 1, 1]), IDS[0]],
        ValueError,
        "0 to 2147483647.*4294967297",
    ),
    "a triple": ([("a", "b", "c")], ValueError, "a tuple of 3"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_document_is_refused_on_every_way_in(model, reader, way, kind):
    x, error, message = REFUSED[kind]
    reads_text = "text" in kind or "pair" in kind or "triple" in kind
    with pytest.raises(error, match=message):
        WAYS[way](reader if reads_text and "mask" not in kind else model, x)


@pytest.mark.parametrize(
    "column",
    [np.array(["text", np.nan], object), np.array([["text"], [None]], object)],
)
def test_missing_texts_of_an_array_are_refused(reader, column):
    with pytest.raises(TypeError, match="document 1"):
        reader.evaluate(column, verbose=0)


PAIRS = [("ab", "cdefgh"), ("c ", "abab ab"), "abcdefgh"]


def test_pairs_are_documents_with_an_answer(byte_lm):
    rows = to_token_rows(PAIRS, byte_lm)
    tokenizer = byte_lm.preprocessor.tokenizer
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    for pair, ids, mask, answer in zip(
        PAIRS, rows["token_ids"], rows["padding_mask"], rows["answer_mask"]
    ):
        prompt, text = pair if isinstance(pair, tuple) else ("", pair)
        before = [start, *tokenizer([prompt])[0]] if prompt else []
        whole = [*(before or [start]), *tokenizer([text])[0], end]
        assert ids[mask].tolist() == whole
        assert answer.sum() == len(whole) - len(before)
        assert answer[len(before) : len(whole)].all()
    packed = keras_ebft.data.pack(PAIRS, tokenizer, 24, strategy="in_order").load()
    kept = packed.arrays["token_ids"][packed.arrays["padding_mask"]]
    np.testing.assert_array_equal(rows["token_ids"][rows["padding_mask"]], kept)
    answers = packed.arrays["answer_mask"].sum()
    assert rows["answer_mask"].sum() == answers


def test_pairs_of_token_ids_need_no_tokenizer(model):
    pairs = [(IDS[0, :5], IDS[0, 5:]), (IDS[1, :4], IDS[1, 4:])]
    rows = to_token_rows(pairs, model.causal_lm)
    np.testing.assert_array_equal(rows["token_ids"], IDS)
    assert rows["answer_mask"].sum(axis=1).tolist() == [7, 8]
    ragged = to_token_rows([[1, 2, 3], np.array([4])], model.causal_lm)
    assert ragged["token_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert ragged["padding_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def measured(model, x, **options):
    return model.evaluate(x, return_dict=True, verbose=0, **options)["ce_loss"]


def test_pairs_count_answers_on_every_way_in(reader):
    """The cross-entropy of two answers, whichever way they came."""
    pairs = PAIRS[:2]
    rows = to_token_rows(pairs, reader.causal_lm)
    expected = measured(reader, rows)
    plain = {name: rows[name] for name in ("token_ids", "padding_mask")}
    assert measured(reader, plain) != pytest.approx(expected, rel=1e-5)
    stream = keras_ebft.data.pack(pairs, reader.causal_lm.preprocessor.tokenizer, 24)
    history = reader.fit(pairs, validation_data=pairs, verbose=0).history
    found = {
        "evaluate": measured(reader, pairs),
        "batches": measured(reader, iter([pairs])),
        "PackedRows": measured(reader, stream.load()),
        "PackedStream": measured(reader, stream),
        "py_dataset": measured(reader, stream.load().py_dataset(2)),
        "fit": history["ce_loss"][0],
        "validation": history["val_ce_loss"][0],
        "train_on_batch": reader.train_on_batch(pairs, return_dict=True)["ce_loss"],
        "test_on_batch": reader.test_on_batch(pairs, return_dict=True)["ce_loss"],
        "loss_terms": float(
            to_numpy(reader.loss_terms(pairs, reader.rollout(pairs))["ce_loss"])
        ),
        "cross_entropy": cross_entropy(reader, pairs)["answer_cross_entropy"],
    }
    for way, value in found.items():
        assert value == pytest.approx(expected, rel=1e-5), way


def test_targets_in_validation_data_are_refused(model, reader):
    with pytest.raises(ValueError, match=r"no targets.*list of tuples"):
        model.fit(IDS, validation_data=(IDS, IDS), verbose=0)
    # Two documents, as anywhere else.
    assert len(to_token_rows(("a", "b"), reader.causal_lm)["token_ids"]) == 2


class Column:
    """What a column of a Hugging Face data set does."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    def __iter__(self):
        return iter(self.values)


def test_a_column_of_texts_is_documents_in_memory(reader):
    texts = ["abababab", "cdefghij", "ab ab ab"]
    expected = measured(reader, texts)
    assert measured(reader, Column(texts), batch_size=2) == pytest.approx(expected)
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"text": texts})["text"]
    assert measured(reader, column) == pytest.approx(expected)


def test_texts_are_kept_as_they_are(byte_lm):
    """Not as an array, whose strings have no trailing NUL and all one width."""
    rows = to_token_rows(["ab\0\0", b"ab"], byte_lm)
    assert rows["padding_mask"].sum(axis=1).tolist() == [1 + 1 + 2 + 1, 1 + 1 + 1]


def test_one_long_text_does_not_widen_all_others(byte_lm):
    """As an array of strings they would take 301 times 400 kB."""
    texts = ["ab"] * 300 + ["c" * 100_000]
    tracemalloc.start()
    rows = to_token_rows(texts, byte_lm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows["token_ids"].shape == (301, 24)
    assert peak < 60e6


def test_markers_are_not_doubled(byte_lm):
    tokenizer = byte_lm.preprocessor.tokenizer
    start, end = tokenizer.start_token, tokenizer.end_token
    plain = to_token_rows(["ab"], byte_lm)["token_ids"].tolist()
    assert to_token_rows([f"{start}ab{end}"], byte_lm)["token_ids"].tolist() == plain
    ids = keras_ebft.data.pack([f"{start}ab{end}"], tokenizer, 8).load().arrays
    assert ids["token_ids"][ids["padding_mask"]].tolist() == plain[0]
    pair = to_token_rows([(f"{start}a", f"b{end}")], byte_lm)
    assert pair["padding_mask"].sum() == 4
    # Of token ids, too, where markers are asked for.
    ids = keras_ebft.data.pack([np.array(plain[0])], tokenizer, 8).load().arrays
    assert ids["token_ids"][ids["padding_mask"]].tolist() == plain[0]


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece tokenizer that puts a blank before every text, as Llama's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x", "a  b   c    d"] * 4),
        model_writer=file,
        model_type="char",
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return keras_hub.models.LlamaTokenizer(proto=file.getvalue())


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("def f(x):\n", "    return x"),
        ("def f(x):", "\n    return x"),
        ("a ", "b"),
        ("a", "b"),
        ("a", "é b"),
        ("", "b"),
    ],
)
def test_an_answer_goes_on_where_its_prompt_ends(pieces, prompt, answer):
    """SentencePiece would put a blank between them."""
    (whole,) = DocumentTokenizer(pieces, special_tokens=False)([(prompt, answer)])
    ids, start = whole
    assert pieces.detokenize(ids.tolist()) == prompt + answer or not prompt
    assert ids[:start].tolist() == list(pieces([prompt])[0])
    if prompt:
        assert ids.tolist() == list(pieces([prompt + answer])[0])


def test_a_text_that_is_cut_has_no_end_token_and_is_counted(byte_lm):
    report = DataReport()
    rows = to_token_rows(["c" * 30, "ab", ""], byte_lm, report=report)
    tokenizer = byte_lm.preprocessor.tokenizer
    assert rows["token_ids"][0].tolist() == [
        tokenizer.start_token_id,
        *[tokenizer.token_to_id("c")] * 23,
    ]
    assert report.documents == 2
    assert report.tokens == 24 + 3
    assert (report.cut_documents, report.dropped_tokens) == (1, 32 - 24)
    assert report.empty_rows == 1


def said(caplog, model, x, **options):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="keras_ebft"):
        model.fit(x, verbose=0, **options)
    found = [r for r in caplog.records if "Data of this training" in r.getMessage()]
    return [(r.levelname, r.getMessage()) for r in found]


def test_what_became_of_the_data_is_said_once_per_fit(model, reader, caplog):
    found = said(caplog, model, IDS, epochs=2)
    assert found == [
        (
            "INFO",
            "Data of this training: 2 documents in 2 rows, 24 tokens, 2 live blocks "
            "per row.",
        )
    ]
    # As a stream the same, when it has been read.
    assert said(caplog, model, iter([IDS])) == found
    short = [IDS[0], *[IDS[1, :5]] * 3]
    ((level, text),) = said(caplog, model, short)
    assert level == "WARNING"
    assert "27 tokens, 0.5 live blocks per row, none in 3 rows" in text
    ((level, text),) = said(caplog, reader, ["ab" * 30, "c"])
    assert level == "WARNING"
    assert "8 more dropped, because 1 documents are longer" in text


@pytest.mark.on_torch
@pytest.mark.parametrize("form", ["rows", "py_dataset", "stream", "batches"])
def test_what_packing_did_with_documents_is_said(model, caplog, form):
    """Documents, not the pieces they are in; and what is in no row at all."""
    ids = documents(1, 40)[0]
    texts = [ids[:12], ids[:30], ids[:0], ids[:14]]
    options = {"tokenizer": None, "length": 16}
    forms = {
        "rows": lambda stream: stream.load(),
        "py_dataset": lambda stream: stream.load().py_dataset(2),
        "stream": lambda stream: stream,
        "batches": lambda stream: stream.batches(2),
    }
    stream = keras_ebft.data.pack(texts, **options)
    ((level, text),) = said(caplog, model, forms[form](stream))
    assert level == "WARNING"
    assert "3 documents in 4 rows, 56 tokens" in text
    assert "1 documents split, 1 documents without a token left out" in text
    stream = keras_ebft.data.pack(texts, **options, long_documents="drop")
    ((_, text),) = said(caplog, model, forms[form](stream))
    assert "2 documents in 2 rows, 26 tokens, 30 more left out by pack" in text
    assert "1 documents are longer than a row" in text


ANSWERS = {"token_ids": IDS, "answer_mask": np.zeros((2, 12), bool)}
NOTHING = {
    "too short": [IDS[0, :6], IDS[1, :5]],
    "no answer": ANSWERS,
    "no anchor": {"token_ids": IDS, "anchors": np.full((2, 1), -1)},
    "short segments": {
        "token_ids": IDS,
        "segment_ids": np.repeat([[1, 2]], 6, axis=1).repeat(2, axis=0),
    },
}


@pytest.mark.parametrize("kind", NOTHING)
def test_data_of_which_nothing_counts_is_refused(model, kind):
    x = NOTHING[kind]
    if kind == "too short":
        # One long row of padding, so that there is room for a block.
        rows = to_token_rows(x, model.causal_lm)
        x = {name: np.pad(v, ((0, 0), (0, 6))) for name, v in rows.items()}
    for way in ("fit", "evaluate", "fit on batches"):
        with pytest.raises(ValueError, match=r"at least one block.*2 rows"):
            WAYS[way](model, x)


def test_supervised_data_of_which_nothing_counts_is_refused():
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    for x in (ANSWERS, np.ones((3, 1), int)):
        with pytest.raises(ValueError, match="follows another of its document"):
            model.fit(x, verbose=0)


def test_there_is_nothing_to_predict(model):
    for predict in (model.predict, model.predict_on_batch):
        with pytest.raises(ValueError, match="rollout, score"):
            predict(IDS)


def test_a_data_loader_that_takes_pairs_apart_is_refused(reader):
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(PAIRS[:2], batch_size=2)
    with pytest.raises(ValueError, match="collate_fn=list"):
        reader.evaluate(loader, verbose=0)
    whole = data.DataLoader(PAIRS[:2], batch_size=2, collate_fn=list)
    assert measured(reader, whole) == pytest.approx(measured(reader, PAIRS[:2]))


def test_live_blocks_are_those_of_the_step():
    """Counted in NumPy as the step decides, for every kind of anchors."""
    random = np.random.default_rng(0)
    length = 24
    segments = np.sort(random.integers(1, 4, (40, length)), axis=1)
    mask = np.arange(length) < random.integers(1, length + 1, (40, 1))
    answers = random.random((40, length)) < 0.6
    rows = {
        "token_ids": np.zeros((40, length), "int32"),
        "padding_mask": mask,
        "segment_ids": segments.astype("int32") * mask,
        "answer_mask": answers,
    }
    given = {**rows, "anchors": random.integers(1, length, (40, 3)).astype("int32")}
    kinds = (
        {},
        {"anchors": "answer_start", "num_anchors": 3},
        {"anchors": "random", "num_anchors": 5},
    )
    for options in kinds:
        sampler = keras_ebft.BlockSampler(
            rollout_length=3, stride=4, context_length=2, **options
        )
        for x in (rows, {k: rows[k] for k in rows if k != "segment_ids"}, given):
            for stops in (False, True):
                read = keras_ebft.layout.documents.read_documents(
                    {k: keras.ops.convert_to_tensor(v) for k, v in x.items()}
                )
                uniform = keras.ops.ones((40, length))
                blocks = sampler.blocks(read, uniform, stops)
                expected = to_numpy(blocks.live).sum(axis=1)
                found = sampler.live_blocks(x, stops)
                np.testing.assert_array_equal(found, expected, str(options))


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_stands_at_the_first_answer_that_has_a_prompt(packed):
    """A piece of an answer that was cut in two is passed over."""
    segments = np.repeat([[1, 2]], [12, 12], axis=1)
    answers = np.zeros((1, 24), bool)
    # The row begins within an answer; the next prompt's answer is at 17.
    answers[0, :12] = True
    answers[0, 17:22] = True
    rows = {"token_ids": documents(1, 24), "answer_mask": answers}
    if packed:
        rows["segment_ids"] = segments
    sampler = keras_ebft.BlockSampler(
        rollout_length=3, anchors="answer_start", stop_token_ids=None, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=0)
    assert to_numpy(model.rollout(rows, seed=0)["anchors"]).tolist() == [[17]]


def test_a_verifier_reads_around_ids_that_are_no_tokens():
    """A backbone may be padded to more of them than its tokenizer knows."""
    causal_lm = helpers.byte_causal_lm()
    size = causal_lm.preprocessor.tokenizer.vocabulary_size()
    backbone = type(causal_lm.backbone)(
        **{**causal_lm.backbone.get_config(), "vocabulary_size": size + 7}
    )
    padded = type(causal_lm)(backbone, preprocessor=causal_lm.preprocessor)
    read = []

    def verify(prompts, completions, targets):
        read.extend(completions)
        return np.zeros((1, 2, 1), "float32")

    model = keras_ebft.EBFTModel(
        padded,
        keras_ebft.BlockSampler(3, context_length=4, stride=8, num_samples=2),
        reward=keras_ebft.VerifierReward(verify),
        seed=0,
    )
    rollouts = np.array([[[[1, size, 2]], [[size + 6, 3, size + 1]]]], "int32")
    model.rewards(documents(1, 8, vocabulary=20), rollouts)
    letters = padded.preprocessor.tokenizer
    expected = [[letters.detokenize([1, 2])], [letters.detokenize([3])]]
    assert read == [expected]


@pytest.fixture(scope="module")
def padded_reader(pieces):
    """Reads SentencePiece; its backbone has more ids than there are pieces."""
    set_random_seed(0)
    models = keras_hub.models
    backbone = models.LlamaBackbone(pieces.vocabulary_size() + 7, 1, 2, 8, 8, 1)
    preprocessor = models.LlamaCausalLMPreprocessor(pieces, sequence_length=12)
    return models.LlamaCausalLM(backbone, preprocessor=preprocessor)


def test_a_verifier_reads_the_blank_that_a_text_goes_on_with(padded_reader, pieces):
    """SentencePiece takes a blank at the beginning of ids for its own."""
    read = []

    def verify(prompts, completions, targets):
        read.extend([prompts[0][0], completions[0][0][0], targets[0][0]])
        return np.zeros((1, 2, 1), "float32")

    sampler = keras_ebft.BlockSampler(
        3, context_length=4, stride=8, num_samples=2, stop_token_ids=None
    )
    reward = keras_ebft.VerifierReward(verify)
    model = keras_ebft.EBFTModel(padded_reader, sampler, reward=reward, seed=0)
    document = list(pieces(["x: a b"])[0])
    rows = {"token_ids": np.array([document]), "anchors": np.array([[3]])}
    written = [*document[3:5], pieces.vocabulary_size() + 3]
    model.rewards(rows, np.array([[[written], [written]]]))
    assert read == ["x:", " a", " a "]


def test_generated_texts_go_on_and_leave_out_what_is_no_token(padded_reader, pieces):
    generate = keras_ebft.evaluation.TextGenerator(padded_reader, 8)
    head = padded_reader.backbone.token_embedding.reverse_embeddings
    blank, size = int(pieces(["x: a"])[0][3]), pieces.vocabulary_size()

    def written(*likeliest):
        """Whatever the hidden states' sign is, one of two tokens."""
        weights = np.zeros(head.shape)
        weights[0, likeliest] = 1.0, -1.0
        head.assign(weights)
        return generate(["x:", "x:"])

    assert written(size + 3, size + 4) == [[""], [""]]
    texts = written(blank, size), written(size, blank)
    assert [["    "], ["    "]] in texts
    assert "generate_postprocess" not in vars(padded_reader.preprocessor)


class Distribution:
    """Any `keras.distribution`: what is refused does not ask it."""


@pytest.mark.parametrize("way", ["fit", "evaluate", "train_on_batch", "rollout"])
def test_a_distribution_that_keras_ignores_is_refused(model, way, monkeypatch):
    monkeypatch.setattr(keras.distribution, "distribution", Distribution)
    with pytest.raises(ValueError, match=r"keras\.distribution\.Distribution.*ignores"):
        WAYS[way](model, IDS)
    with pytest.raises(ValueError, match="ignores"):
        keras_ebft.EBFTModel(llama(num_layers=1))


class Lists(keras.utils.PyDataset):
    """Batches that are lists, of which Keras makes tuples of parts."""

    def __init__(self, batches, **options):
        super().__init__(**options)
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["texts", "vectors"])
def test_a_py_dataset_may_yield_lists(reader, kind, size):
    batch = [f"{n} is a text of some length" for n in range(size)]
    if kind == "vectors":
        batch = list(documents(size, 12))
    reader.fit(Lists([batch, batch]), verbose=0)
    found = reader.data_report
    reader.fit(batch + batch, batch_size=size, verbose=0)
    assert found.documents == reader.data_report.documents == 2 * size
    assert found.live_blocks == reader.data_report.live_blocks > 0


def test_what_is_read_once_is_refused_for_several_epochs(model):
    """Keras would go through the others without a step."""
    x = documents(2, 12)
    with pytest.raises(ValueError, match=r"`x` .*list_iterator.*first of 2 epochs"):
        model.fit(iter([x, x]), epochs=2, verbose=0)
    with pytest.raises(ValueError, match=r"`validation_data` .*`validation_steps`"):
        model.fit(x, validation_data=iter([x]), epochs=3, verbose=0)
    before = model.steps_trained
    model.fit(iter([x, x]), epochs=1, verbose=0)
    model.fit(itertools.repeat(x), epochs=2, steps_per_epoch=1, verbose=0)
    model.fit(iter([x]), initial_epoch=1, epochs=2, verbose=0)
    assert model.steps_trained == before + 2 + 2 + 1


def test_a_call_takes_what_has_been_read(byte_lm):
    model = build(byte_lm)
    for given, shown in (
        (["some text"], "a str"),
        ([[1, 2, 3]], "a list"),
        (np.ones((1, 12), "float32"), "ndarray of float32"),
        ({"padding_mask": np.ones((1, 12))}, r"dict with \['padding_mask'\]"),
    ):
        with pytest.raises(TypeError, match=f"(?s)token ids.*{shown}.*`loss_terms`"):
            model(given)


@pytest.mark.on_torch
def test_a_loader_of_a_tensor_data_set():
    """Torch collates its rows as a list of one tensor."""
    torch = pytest.importorskip("torch")
    model, x = build(llama(num_layers=1)), documents(4, 12)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(np.asarray(x)))
    model.fit(torch.utils.data.DataLoader(rows, batch_size=2), verbose=0)
    report = model.data_report
    assert (report.rows, report.tokens) == (4, 48)
    pairs = [([1, 2, 3, 4], [5, 6, 7, 8])]
    model.fit(Lists([pairs]), verbose=0)
    assert model.data_report.documents == 1


def test_a_share_for_validation_is_not_counted(byte_lm):
    """What is cut of the documents that are trained on is; not of the others."""
    model = build(byte_lm)
    texts = ["ab cd ef gh", "c" * 30, "ab cd ef gh", "d" * 40]
    model.fit(texts, validation_split=0.5, verbose=0)
    report = model.data_report
    assert (report.documents, report.cut_documents) == (2, 1)
    assert report.dropped_tokens == 32 - 24
    packed = keras_ebft.data.pack(
        ["ab cd ef gh", "", "ij kl mn op", "qr st uv"],
        byte_lm.preprocessor.tokenizer,
        14,
    ).load()
    model.fit(packed, validation_split=0.5, verbose=0)
    # Of what was left out nobody can say for which share.
    assert model.data_report.empty_documents == 1
    assert model.data_report.rows == len(packed) // 2


def test_validation_data_may_be_a_stream_of_batches():
    model, x = build(llama(num_layers=1)), documents(4, 12)
    stream = Lists([x[:3]])
    history = model.fit(x, batch_size=2, validation_data=stream, verbose=0).history
    assert "val_reward" in history
    with pytest.raises(ValueError, match="no `batch_size`"):
        model.fit(x, validation_data=stream, validation_batch_size=2, verbose=0)


def test_nothing_to_train_is_refused():
    causal_lm = llama(num_layers=1)
    model = keras_ebft.EBFTModel.sft(causal_lm)
    causal_lm.trainable = False
    model.compile("sgd")
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=r"weights to train.*frozen"):
            train(documents(2, 12))


def test_misspelt_arguments_of_compile_are_refused(model):
    for value in (False, True):
        with pytest.raises(TypeError, match="Received: auto_scale_los"):
            model.compile("sgd", auto_scale_los=value)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Other backends compile steps."
)
def test_compilation_is_refused_on_pytorch(model):
    with pytest.raises(ValueError, match=r"op by op on PyTorch.*jit_compile=True"):
        model.compile("sgd", jit_compile=True)
