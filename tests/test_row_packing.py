"""Packing: every token once, masks and segments right at every border."""

import itertools

import numpy as np
import pytest

from keras_ebft.data import PackedStream, TextFiles, pack
from keras_ebft.data.bin_packing import STRATEGIES, best_fit, in_order

pytestmark = pytest.mark.backend_independent


class LetterTokenizer:
    """One token per character; 1 and 2 begin and end a document."""

    start_token_id = 1
    end_token_id = 2

    def __call__(self, texts):
        return [[ord(letter) for letter in text] for text in texts]


class OnlyIterable:
    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


def random_documents(seed, count=60, longest=40):
    """Token id vectors, some empty, some longer than a row; ids never repeat."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, longest, count)
    ids = iter(np.split(np.arange(1, sizes.sum() + 1), np.cumsum(sizes)[:-1]))
    return list(ids)


def segments(rows):
    """`(token ids, answer mask)` of every segment, in reading order."""
    for ids, numbers, answers in zip(
        rows["token_ids"], rows["segment_ids"], rows["answer_mask"]
    ):
        for number in range(1, numbers.max() + 1):
            yield ids[numbers == number], answers[numbers == number]


PIECE_BY_PIECE = [name for name in STRATEGIES if name != "stream"]


@pytest.mark.parametrize("strategy", PIECE_BY_PIECE)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_appears_exactly_once(strategy, seed):
    documents = random_documents(seed)
    rows = pack(documents, None, 17, strategy=strategy, window_rows=4).load()
    arrays, report = rows.arrays, rows.report
    seen = arrays["token_ids"][arrays["padding_mask"]]
    total = sum(map(len, documents))
    np.testing.assert_array_equal(np.sort(seen), np.arange(1, total + 1))
    assert report.tokens == total
    assert report.rows == len(rows)
    assert report.fill_rate == pytest.approx(total / (len(rows) * 17))
    assert report.documents == len(documents)
    assert report.empty_documents == sum(not len(ids) for ids in documents)
    assert report.split_documents == sum(len(ids) > 17 for ids in documents)


@pytest.mark.parametrize("strategy", PIECE_BY_PIECE)
@pytest.mark.parametrize("seed", range(8))
def test_segments_are_whole_pieces_and_rows_are_padded_right(strategy, seed):
    documents = random_documents(seed)
    arrays = pack(documents, None, 17, strategy=strategy, window_rows=4).load().arrays
    pieces = {
        tuple(ids[start : start + 17])
        for ids in documents
        for start in range(0, len(ids), 17)
    }
    found = [tuple(ids) for ids, _ in segments(arrays)]
    assert len(found) == len(pieces)
    assert set(found) == pieces
    mask, numbers = arrays["padding_mask"], arrays["segment_ids"]
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()
    np.testing.assert_array_equal(numbers > 0, mask)
    steps = np.diff(numbers, axis=1)[mask[:, 1:]]
    assert set(steps) <= {0, 1}
    assert (numbers[:, 0] == 1).all()
    np.testing.assert_array_equal(arrays["answer_mask"], mask)
    assert arrays["token_ids"].dtype == arrays["segment_ids"].dtype == np.int32
    assert not arrays["token_ids"][~mask].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_one_text_cut_where_rows_end(seed):
    documents = random_documents(seed)
    text = np.concatenate(documents)
    # All of it in one window; one row is filled up, at the end.
    rows = pack(documents, None, 17, strategy="stream").load()
    mask = rows.arrays["padding_mask"]
    np.testing.assert_array_equal(rows.arrays["token_ids"][mask], text)
    assert len(rows) == -(-len(text) // 17)
    assert mask[:-1].all()
    np.testing.assert_array_equal(rows.arrays["segment_ids"], mask.astype("int32"))
    np.testing.assert_array_equal(rows.arrays["answer_mask"], mask)
    row_of = {token: index // 17 for index, token in enumerate(text)}
    ends = [(row_of[ids[0]], row_of[ids[-1]]) for ids in documents if len(ids)]
    assert rows.report.split_documents == sum(first < last for first, last in ends)
    # Every window ends with a row of its own, and goes on where the last one ended.
    windows = pack(documents, None, 17, strategy="stream", window_rows=4).load()
    found = windows.arrays["token_ids"][windows.arrays["padding_mask"]]
    np.testing.assert_array_equal(found, text)
    short = (~windows.arrays["padding_mask"]).any(axis=1).sum()
    assert 1 < short <= -(-len(windows) // 4)


def test_a_stream_of_pairs_by_hand():
    stream = pack([("ab", "c"), ("d", "ef")], LetterTokenizer(), 5, strategy="stream")
    arrays = stream.load().arrays
    a, b, c, d, e, f = map(ord, "abcdef")
    assert arrays["token_ids"].tolist() == [[1, a, b, c, 2], [1, d, e, f, 2]]
    answers = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(arrays["answer_mask"], answers)
    three = pack(["a", "b"], LetterTokenizer(), 4, strategy="stream").load().arrays
    assert three["token_ids"].tolist() == [[1, a, 2, 1], [b, 2, 0, 0]]
    assert three["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match="cuts documents of any length"):
        pack(["a"], LetterTokenizer(), 4, strategy="stream", long_documents="drop")


@pytest.mark.parametrize("seed", range(4))
def test_in_order_keeps_the_order_and_best_fit_needs_no_more_rows(seed):
    documents = [ids for ids in random_documents(seed, 400) if len(ids)]
    ordered = pack(documents, None, 41, strategy="in_order").load()
    found = [tuple(ids) for ids, _ in segments(ordered.arrays)]
    assert found == [tuple(ids) for ids in documents]
    fitted = pack(documents, None, 41, strategy="best_fit").load()
    assert len(fitted) < len(ordered)
    assert fitted.report.fill_rate > ordered.report.fill_rate + 0.1


@pytest.mark.parametrize("function", [in_order, best_fit])
@pytest.mark.parametrize("seed", range(8))
def test_no_row_overflows(function, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 14, random.integers(1, 300))
    rows = function(lengths, 13)
    filled = np.bincount(rows, weights=lengths)
    assert (filled <= 13).all()
    assert (filled > 0).all()
    # Numbered by first appearance.
    firsts = [np.flatnonzero(rows == row)[0] for row in range(rows.max() + 1)]
    assert firsts == sorted(firsts)


def test_best_fit_by_hand():
    """6 goes first, 5 next, 4 fills the 6, 3 + 2 fill the 5."""
    rows = best_fit(np.array([3, 6, 2, 5, 4]), 10)
    assert rows[1] == rows[4]
    assert rows[0] == rows[2] == rows[3]


def test_pairs_mark_answer_and_end_tokens():
    rows = pack([("ab", "xyz"), ("", "q")], LetterTokenizer(), 12).load().arrays
    assert [chr(i) if i > 2 else i for i in rows["token_ids"][0]] == [
        *(1, "a", "b", "x", "y", "z", 2),
        *(1, "q", 2, 0, 0),
    ]
    answers = rows["answer_mask"][0].astype(int).tolist()
    assert answers == [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_answer_tokens_follow_their_document_into_every_row(seed):
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(50):
        prompt, answer = random.integers(0, 15), random.integers(1, 25)
        # Odd ids are answers.
        pairs.append((np.full(prompt, 2 * number + 2), np.full(answer, 2 * number + 3)))
    arrays = pack(pairs, None, 19, window_rows=3).load().arrays
    odd = arrays["token_ids"] % 2 == 1
    np.testing.assert_array_equal(arrays["answer_mask"], odd)


def test_drops_are_counted():
    documents = ["abc", "", "a" * 30, "de", ("prompt", "")]
    stream = pack(documents, LetterTokenizer(), 8, long_documents="drop")
    report = stream.load().report
    assert (report.documents, report.empty_documents) == (5, 2)
    assert (report.dropped_documents, report.dropped_tokens) == (1, 32)
    assert report.tokens == 5 + 4
    assert "5 documents in 2 rows of 8" in str(report)
    assert "1 too long and dropped (32 tokens), 2 empty" in str(report)


def test_special_tokens_can_be_left_out():
    stream = pack(["ab"], LetterTokenizer(), 4, special_tokens=False)
    assert next(iter(stream))["token_ids"].tolist() == [97, 98, 0, 0]


def test_a_document_of_ten_million_tokens():
    document = np.arange(10_000_000, dtype="int32")
    stream = pack([[5, 6], document, [7]], None, 1024)
    place = 0
    for block in stream.blocks():
        assert len(block["token_ids"]) <= 256
        ids = block["token_ids"][block["padding_mask"]]
        place += len(ids)
    assert place == 10_000_003 == stream.report.tokens
    assert stream.report.split_documents == 1


def test_memory_holds_one_window():
    """Documents are read as rows are asked for, not before."""
    read = []

    def documents():
        for number in range(10_000):
            read.append(number)
            yield np.full(100, number)

    next(iter(pack(documents, None, 100, window_rows=8)))
    # One tokenizer call's worth at most beyond the window.
    assert len(read) <= 8 + 256


@pytest.mark.parametrize("taken", [0, 1, 7, 8, 9, 23])
def test_a_pass_goes_on_where_it_stopped(taken):
    documents = random_documents(0)

    def stream():
        return pack(documents, None, 17, window_rows=4, shard=(1, 2))

    whole = [row["token_ids"].tolist() for row in stream()]
    first = stream()
    before = [r["token_ids"].tolist() for r in itertools.islice(first, taken)]
    second = stream()
    second.set_state(first.get_state())
    # Looking at the first row, as `fit` does, does not use the position up.
    next(iter(second))
    after = [row["token_ids"].tolist() for row in second]
    assert before + after == whole
    assert [row["token_ids"].tolist() for row in second] == whole


def test_shards_share_the_documents_out():
    documents = random_documents(1)
    seen = []
    for index in range(3):
        arrays = pack(documents, None, 17, shard=(index, 3)).load().arrays
        mine = np.concatenate(documents[index::3])
        ids = arrays["token_ids"][arrays["padding_mask"]]
        np.testing.assert_array_equal(np.sort(ids), np.sort(mine))
        seen.extend(ids)
    assert sorted(seen) == list(range(1, sum(map(len, documents)) + 1))


def test_functions_iterables_and_sequences_are_read_alike():
    documents = random_documents(2)
    expected = pack(documents, None, 17).load().arrays["token_ids"]
    for form in (lambda: iter(documents), tuple(documents), OnlyIterable(documents)):
        stream = pack(form, None, 17)
        for _ in range(2):
            np.testing.assert_array_equal(stream.load().arrays["token_ids"], expected)


def test_batches_and_random_access_hold_the_same_rows():
    stream = pack(random_documents(3), None, 17)
    rows = stream.load()
    batches = list(stream.batches(4))
    assert [len(batch["token_ids"]) for batch in batches[:-1]] == [4] * (
        len(batches) - 1
    )
    joined = np.concatenate([batch["segment_ids"] for batch in batches])
    np.testing.assert_array_equal(joined, rows.arrays["segment_ids"])
    np.testing.assert_array_equal(rows[-1]["segment_ids"], joined[-1])
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_py_dataset_shuffles_every_epoch_and_repeats_with_the_seed():
    rows = pack(random_documents(4), None, 17).load()
    first, second = rows.py_dataset(4, seed=1), rows.py_dataset(4, seed=1)
    orders = []
    for _ in range(2):
        ids = np.concatenate([first[i]["token_ids"] for i in range(len(first))])
        again = np.concatenate([second[i]["token_ids"] for i in range(len(second))])
        np.testing.assert_array_equal(ids, again)
        orders.append(ids)
        # As a trainer that says no number of an epoch.
        first.on_epoch_end()
        second.on_epoch_end()
    assert (orders[0] != orders[1]).any()
    kept = rows.arrays["token_ids"]
    for ids in orders:
        np.testing.assert_array_equal(ids[np.lexsort(ids.T)], kept[np.lexsort(kept.T)])
    plain = rows.py_dataset(100, shuffle=False)
    np.testing.assert_array_equal(plain[0]["token_ids"], kept)


def test_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("b = 2\n")
    (tmp_path / "a.py").write_text("a = 'ä'\n", encoding="utf-8")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe")
    (tmp_path / "other.txt").write_text("no")
    texts = TextFiles(tmp_path, "*.py")
    assert list(texts) == ["a = 'ä'\n", "b = 2\n"]
    assert [path.name for path in texts.skipped] == ["broken.py"]
    with pytest.raises(ValueError, match=r"UTF-8.*broken\.py.*skip"):
        list(TextFiles(tmp_path, "*.py", not_utf8="raise"))
    with pytest.raises(ValueError, match=r"\*\.md.*none"):
        TextFiles(tmp_path, "*.md")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextFiles(tmp_path / "nowhere")


BAD = [
    ({"documents": "one text"}, TypeError, "one str.*list"),
    ({"documents": 3}, TypeError, "iterable.*int"),
    ({"documents": iter(["a"])}, ValueError, "used up.*function"),
    ({"length": 0}, ValueError, "length=0"),
    ({"length": 8.0}, TypeError, "length=8.0"),
    ({"strategy": "worst_fit"}, ValueError, "best_fit.*worst_fit"),
    ({"long_documents": "cut"}, ValueError, "split.*'cut'"),
    ({"shard": 2}, ValueError, "shard=2"),
    ({"shard": (2, 2)}, ValueError, r"shard=\(2, 2\)"),
    ({"window_rows": 0}, ValueError, "window_rows=0"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_arguments(change, error, message):
    arguments = {"documents": ["a"], "tokenizer": LetterTokenizer(), "length": 8}
    with pytest.raises(error, match=message):
        pack(**{**arguments, **change})


UNREADABLE = [
    ([], "at least one.*0 documents"),
    (["", ""], "2 empty"),
    (["ok", b"\xff"], "UTF-8.*document 1"),
    ([("a", "b", "c")], "document 0, a tuple of 3"),
]


@pytest.mark.parametrize("documents, message", UNREADABLE)
def test_unreadable_documents(documents, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, LetterTokenizer(), 8).load()


@pytest.mark.parametrize("document", [1.5, [0.5], {"text": "a"}, [[1, 2]]])
def test_documents_of_another_kind(document):
    with pytest.raises(TypeError, match=r"document 1, .*from_records"):
        pack(["a", document], LetterTokenizer(), 8).load()


def test_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"tokenizer.*'text'"):
        pack(["text"], None, 8).load()


def test_bad_state():
    stream = pack(["a"], LetterTokenizer(), 8)
    assert isinstance(stream, PackedStream)
    with pytest.raises(ValueError, match="get_state"):
        stream.set_state({"row": 1})
    with pytest.raises(ValueError, match="documents=-1"):
        stream.set_state({"documents": -1, "rows": 0})


@pytest.mark.parametrize("tokenizer", [5, "llama", [1]])
def test_what_cannot_tokenize_is_refused(tokenizer):
    with pytest.raises(TypeError, match=r"function from a list.*tokenizer="):
        pack(["ab"], tokenizer, 8)


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (lambda texts: [[0.5, 1.5] for _ in texts], TypeError, r"\[0\.5, 1\.5\]"),
        (lambda texts: [[2**32 + 1] for _ in texts], ValueError, "4294967297"),
        (lambda texts: [[1, 2]], ValueError, "1 for 2 texts"),
    ],
)
def test_what_a_tokenizer_returns_is_checked(tokenizer, error, message):
    with pytest.raises(error, match=message):
        pack(["ab", "cd"], tokenizer, 4).load()


@pytest.mark.parametrize("one", [3, np.int64(3), np.array(3), "text"])
def test_one_value_is_no_documents(one):
    with pytest.raises(TypeError, match=r"Expected.*documents.*Received"):
        pack(one, None, 8)


@pytest.mark.parametrize("given", [1, "yes", np.array([])])
def test_special_tokens_are_there_or_not(given):
    with pytest.raises(TypeError, match="`special_tokens` to be True or False"):
        pack([[1, 2]], None, 8, special_tokens=given)
