"""Tables, files and folders are documents wherever documents are."""

import json

import keras
import numpy as np
import pytest

import keras_ebft
from keras_ebft.data import from_path, from_records, pack

TEXTS = ["abcdabcd", "cdefghij", "ab ab ab"]
PAIRS = [("ab", "cdefgh"), ("c ", "abab ab")]


def letters(texts):
    return [[ord(letter) for letter in text] for text in texts]


def packed(documents):
    """The documents as `pack` reads them, pairs with a bar between."""
    rows = pack(documents, letters, 24, strategy="in_order").load().arrays
    found = []
    for ids, answers, segments in zip(
        rows["token_ids"], rows["answer_mask"], rows["segment_ids"]
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            text = "".join(map(chr, ids[inside]))
            start = int(answers[inside].argmax())
            found.append((text[:start], text[start:]) if start else text)
    return found


def pandas_frame(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def polars_frame(columns):
    return pytest.importorskip("polars").DataFrame(columns)


def arrow_table(columns):
    return pytest.importorskip("pyarrow").table(columns)


def data_set(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def formatted(columns):
    return data_set(columns).with_format("numpy")


def streamed(columns):
    return data_set(columns).to_iterable_dataset()


TABLES = (pandas_frame, polars_frame, arrow_table, data_set, formatted, streamed)
PAIR_COLUMNS = {
    "prompt": [prompt for prompt, _ in PAIRS],
    "answer": [answer for _, answer in PAIRS],
}


@pytest.mark.backend_independent
@pytest.mark.parametrize("table", TABLES)
def test_pack_takes_tables(table):
    assert packed(table({"text": TEXTS, "other": [1, 2, 3]})) == TEXTS
    assert packed(table(PAIR_COLUMNS)) == PAIRS
    named = from_records(table({"body": TEXTS}), text="{body}")
    assert packed(named) == TEXTS
    message = r"'text'.*\['body'\].*from_records\(table"
    with pytest.raises(ValueError, match=message):
        pack(table({"body": TEXTS}), letters, 24)
    with pytest.raises(ValueError, match="not all of them"):
        pack(table({"text": ["a", "b"], **PAIR_COLUMNS}), letters, 24)


@pytest.mark.backend_independent
def test_columns_of_chosen_rows_have_other_labels():
    frame = pandas_frame({"text": TEXTS, "kept": [False, True, True]})
    chosen = frame[frame["kept"]]
    assert packed(chosen) == packed(chosen["text"]) == TEXTS[1:]
    missing = pandas_frame({"text": ["a", None, "b"]})
    stream = pack(missing, letters, 24)
    assert stream.load().report.empty_documents == 1


@pytest.mark.backend_independent
def test_a_dictionary_of_splits_is_no_data_set():
    splits = pytest.importorskip("datasets").DatasetDict(train=data_set({"text": []}))
    with pytest.raises(ValueError, match=r"one split.*x\['train'\]"):
        pack(splits, letters, 24)


@pytest.fixture
def files(tmp_path):
    """Function that writes content to a file of a name."""

    def write(name, content):
        (tmp_path / name).write_text(content, "utf-8")
        return tmp_path / name

    return write


def lines(records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


@pytest.mark.backend_independent
def test_files_of_records(files, tmp_path):
    records = [{"text": text} for text in TEXTS]
    wanted = {"a.jsonl": lines(records), "a.json": json.dumps(records)}
    wanted["a.csv"] = "text,other\n" + "".join(f'"{text}",1\n' for text in TEXTS)
    wanted["a.tsv"] = "text\tother\n" + "".join(f"{text}\t1\n" for text in TEXTS)
    for name, content in wanted.items():
        assert packed(files(name, content)) == TEXTS
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow_table({"text": TEXTS}), path
    )
    assert packed(path) == TEXTS
    pairs = files("pairs.jsonl", lines({"q": q, "a": a} for q, a in PAIRS))
    assert list(from_path(pairs, prompt="{q}", answer="{a}")) == PAIRS
    assert packed(from_path(str(pairs), text="{q}{a}")) == ["abcdefgh", "c abab ab"]


@pytest.mark.backend_independent
def test_slices_of_a_file_are_documents(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    documents = keras_ebft.data.from_path(path)
    assert documents[1:] == ["two", "three"]
    assert documents[:-2] == ["one"]
    assert documents[-1] == "three"


def test_texts_are_whole(files):
    """Line ends within a field, and fields longer than a spreadsheet's."""
    text = "a\u2028b\n" + "c" * 200_000
    assert list(from_path(files("a.jsonl", lines([{"text": text}])))) == [text]
    assert list(from_path(files("a.csv", f'text\n"{text}"\n'))) == [text]
    # Where lines end for `str.splitlines` and nobody else; quoted or not.
    unquoted = "a\u2028b\x0cc\x0bd\x85e\x1cf"
    for name, content in (("c.csv", f"{unquoted},1"), ("c.tsv", f"{unquoted}\t1")):
        header = "text,other" if name.endswith("csv") else "text\tother"
        path = files(name, f"{header}\n{content}\n")
        assert list(from_path(path)) == [unquoted]
    path = files("d.csv", "")
    path.write_bytes(b"text\r\na\r\nb\rc\nd")
    assert list(from_path(path)) == ["a", "b", "c", "d"]
    # As some programs write UTF-8.
    assert list(from_path(files("b.csv", "\ufefftext\nab\n"))) == ["ab"]
    assert from_path(files("a.txt", text)) == [text]


@pytest.mark.backend_independent
def test_a_folder_of_texts(files, tmp_path):
    files("a.txt", "first")
    files("b.md", "second")
    assert packed(tmp_path) == ["first"]
    assert list(from_path(tmp_path, pattern="*.md")) == ["second"]


@pytest.mark.backend_independent
def test_files_that_cannot_be_read_say_why(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        from_path(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"line 2, '\{oh'.*Mend"):
        from_path(files("a.jsonl", '{"text": "a"}\n{oh\n'))
    with pytest.raises(ValueError, match=r"named columns.*\[1, 2\]"):
        from_path(files("b.jsonl", "[1, 2]\n"))
    for content, reason in {
        "text\na, b\n": r"line 2, 2 fields for the columns \['text'\]",
        'text\n"a': "line 2, unexpected end",
        'text\n"a" b\n': "line 2, ',' expected",
        "text,text\na,b\n": "two columns of one name",
    }.items():
        with pytest.raises(ValueError, match=rf"c\.csv.*{reason}.*Mend"):
            from_path(files("c.csv", content))
    with pytest.raises(ValueError, match=r"\.jsonl, .*a\.pdf"):
        from_path(files("a.pdf", ""))
    with pytest.raises(ValueError, match=r"in Parquet.*a\.parquet"):
        from_path(files("a.parquet", "PAR"))
    with pytest.raises(ValueError, match=r"no templates.*text"):
        from_path(files("a.txt", ""), text="{text}")
    with pytest.raises(ValueError, match=r"folder with `pattern`"):
        from_path(tmp_path / "a.txt", pattern="*.txt")
    with pytest.raises(TypeError, match=r"pathlib\.Path"):
        pack(str(tmp_path), letters, 24)


@pytest.fixture(scope="module")
def model(byte_lm):
    sampler = keras_ebft.BlockSampler(
        rollout_length=3, stride=4, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(byte_lm, sampler, network, seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    return model


def measured(model, x):
    return model.evaluate(x, return_dict=True, verbose=0)["ce_loss"]


@pytest.mark.on_torch
def test_fit_and_evaluate_take_what_pack_takes(model, files, tmp_path):
    expected = measured(model, TEXTS)
    path = files("a.jsonl", lines({"text": text} for text in TEXTS))
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    held = [path, folder, keras_ebft.data.TextFiles(folder)]
    held += [table({"text": TEXTS}) for table in (pandas_frame, arrow_table, data_set)]
    for x in held:
        assert measured(model, x) == pytest.approx(expected, rel=1e-6)
    history = model.fit(path, validation_data=held[3], verbose=0).history
    assert history["val_ce_loss"][0] == pytest.approx(expected, rel=1e-6)
    split = model.fit(held[3], validation_split=0.4, verbose=0).history
    wanted = measured(model, TEXTS[1:])
    assert split["val_ce_loss"][0] == pytest.approx(wanted, rel=1e-6)
    pairs = measured(model, pandas_frame(PAIR_COLUMNS))
    assert pairs == pytest.approx(measured(model, PAIRS), rel=1e-6)
    assert np.isfinite(pairs)


@pytest.mark.on_torch
def test_streams_of_single_documents_name_the_right_call(model):
    table = streamed({"text": TEXTS})
    for x in (table, from_records(table, text="{text}")):
        with pytest.raises(TypeError, match=r"keras_ebft\.data\.pack\("):
            model.fit(x, verbose=0)
