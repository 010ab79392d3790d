"""Data sets by name: our own builders, Hugging Face folders, columns and templates."""

import gettext
import importlib
import json
import platform
import struct
import sys

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_ebft.data import from_records, load, pack
from keras_ebft.data.builders import builder_class, catalogue_files, standard_library
from keras_ebft.data.builders.functions import documented_functions

pytestmark = pytest.mark.backend_independent

VERSION = platform.python_version()


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of a few files, one in each split and one broken."""
    root = tmp_path / "lib"
    (root / "pkg").mkdir(parents=True)
    sources = {
        "pkg/__init__.py": 'def f(x):\n    """Doc.\n\n    >>> f(1)\n    2\n    """\n'
        "    return x + 1\n",
        "a.py": "a = 1\n",
        "b.py": "b = 1\n",
        "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n",
        "empty.py": "",
    }
    for name, text in sources.items():
        (root / name).write_text(text, encoding="latin-1")
    (root / "broken.py").write_bytes(b"text = '\xff'\n")
    (root / "test").mkdir()
    (root / "test" / "test_a.py").write_text("import a\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("other = 1\n")
    paths = {"stdlib": str(root)}
    monkeypatch.setattr(standard_library.sysconfig, "get_paths", lambda: paths)
    return root


def prepared(name, folder, config=None):
    builder = builder_class(name)(
        config=config, data_dir=folder, file_format="array_record"
    )
    builder.download_and_prepare()
    return builder


def every_record(builder):
    return {split: list(builder.as_data_source(split)) for split in builder.info.splits}


def test_python_source(small_library, tmp_path):
    builder = prepared("python_source", tmp_path / "data")
    records = every_record(builder)
    texts = {
        r["path"].decode(): r["text"].decode() for s in records.values() for r in s
    }
    assert set(texts) == {
        "a.py",
        "b.py",
        "latin.py",
        "pkg/__init__.py",
        "test/test_a.py",
    }
    assert "é" in texts["latin.py"]
    for split, found in records.items():
        for record in found:
            assert standard_library.split_of(record["path"].decode()) == split
    assert builder.info.metadata["unreadable_files"] == ["broken.py"]
    assert "Python Software Foundation" in builder.info.redistribution_info.license
    without = prepared("python_source", tmp_path / "data", f"{VERSION}-without_tests")
    assert without.info.splits.total_num_examples == 4


def test_python_docstrings(small_library, tmp_path):
    builder = prepared("python_docstrings", tmp_path / "data")
    (record,) = [r for found in every_record(builder).values() for r in found]
    assert {name: value.decode() for name, value in record.items()} == {
        "name": "f",
        "module": "pkg",
        "prompt": 'def f(x):\n    """Doc.\n\n    >>> f(1)\n    2\n    """\n',
        "body": "    return x + 1\n",
        "doctests": "Doc.\n\n>>> f(1)\n2",
    }


SOURCE = '''
def plain(x):
    """Doc."""
    return x

def no_docstring(x):
    return x

def no_body():
    """Doc."""

def one_line(x): """Doc."""; return x

class Counter:
    @property
    def value(self):
        """Doc.

        >>> 1
        1
        """
        if self:
            return 1
        return """text
in the margin"""

    async def wait(self,
                   other):
        """Doc."""
        await other
'''


def test_documented_functions():
    found = documented_functions(SOURCE)
    assert [f.name for f in found] == ["plain", "Counter.value", "Counter.wait"]
    assert found[0].prompt == 'def plain(x):\n    """Doc."""\n'
    assert found[0].body == "    return x\n"
    assert found[1].body.endswith('return """text\nin the margin"""\n')
    assert found[1].doctests == ""
    assert found[2].prompt.startswith("async def wait(self,\n")
    with pytest.raises(SyntaxError):
        documented_functions("def f(:")


def test_documented_functions_end_lines_where_python_does():
    text = "a\u2028b\x0cc\x85d\x1ce"
    source = (
        f'\x0c\nx = "{text}"\r\ndef f(x):\r\n    """Doc {text}."""\r\n    return x\r\n'
    )
    (found,) = documented_functions(source)
    assert found.prompt == f'def f(x):\r\n    """Doc {text}."""\r\n'
    assert found.body == "    return x\r\n"


def write_catalogue(folder, language, domain, messages, order="<"):
    """A `.mo` file as msgfmt writes it."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    entries = [(k.encode(), v.encode()) for k, v in sorted(messages.items())]
    place = 28 + 16 * len(entries)
    tables, texts = [b"", b""], b""
    for column in (0, 1):
        for entry in entries:
            tables[column] += struct.pack(f"{order}2I", len(entry[column]), place)
            texts += entry[column] + b"\0"
            place += len(entry[column]) + 1
    header = struct.pack(
        f"{order}7I",
        *(0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, place),
    )
    path = folder / language / "LC_MESSAGES" / f"{domain}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"".join(tables) + texts)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(tmp_path, order):
    messages = {
        "Open": "Öffnen",
        "%d file\0%d files": "%d Datei\0%d Dateien",
        "menu\4Save": "Speichern",
        "menu\4Close": "Schließen",
        "button\4Close": "Schließen",
        "menu\4Play": "Abspielen",
        "theatre\4Play": "Stück",
        "menu\4": "Nichts",
    }
    path = write_catalogue(tmp_path, "de", "app", messages, order)
    found = catalogue_files.read_catalogue(path)
    assert found == {
        "Open": "Öffnen",
        "%d file": "%d Datei",
        "Save": "Speichern",
        "Close": "Schließen",
    }
    with path.open("rb") as file:
        translations = gettext.GNUTranslations(file)
    assert {m: translations.gettext(m) for m in found}["Open"] == "Öffnen"


@pytest.mark.parametrize("cut", [0, 10, 40, -3])
def test_broken_catalogues(tmp_path, cut):
    path = write_catalogue(tmp_path, "de", "app", {"Open": "Öffnen"})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"gettext catalogue.*app\.mo"):
        catalogue_files.read_catalogue(path)


def pairs_in(folders, data, **languages):
    module = importlib.import_module("keras_ebft.data.builders.message_catalogues")
    config = module.LanguagePair(folders=(str(folders),), **languages)
    builder = prepared("message_catalogues", data, config)
    records = [r for found in every_record(builder).values() for r in found]
    pairs = {r["source"].decode(): r["target"].decode() for r in records}
    assert len(pairs) == len(records)
    return builder, pairs


def test_message_catalogues(tmp_path):
    german = {f"word {i}": f"Wort {i}" for i in range(40)}
    write_catalogue(tmp_path, "de", "app", {**german, "same": "same", "1": "2"})
    write_catalogue(tmp_path, "de", "other", {"word 1": "Anders", "new": "neu"})
    write_catalogue(tmp_path, "fr", "app", {"word 2": "mot 2", "word 3": "mot 3"})
    write_catalogue(tmp_path, "de", "broken", {"a": "b"}).write_bytes(b"none")
    builder, pairs = pairs_in(tmp_path, tmp_path / "data")
    assert pairs == {**german, "new": "neu"}
    broken = builder.info.metadata["unreadable_files"]
    assert [path.split("/")[-1] for path in broken] == ["broken.mo"]
    assert {s.num_examples > 0 for s in builder.info.splits.values()} == {True}
    _, pairs = pairs_in(tmp_path, tmp_path / "data", source="fr", target="de")
    assert pairs == {"mot 2": "Wort 2", "mot 3": "Wort 3"}


def test_missing_catalogues(tmp_path):
    write_catalogue(tmp_path, "de", "app", {"a": "b"})
    with pytest.raises(FileNotFoundError, match=r"\['xx'\].*languages \['de'\]"):
        pairs_in(tmp_path, tmp_path / "data", target="xx")
    with pytest.raises(ValueError, match=r"not English.*Swap"):
        pairs_in(tmp_path, tmp_path / "data", source="de", target="en")
    with pytest.raises(ValueError, match=r"en-de.*'german'"):
        load("message_catalogues", "train", config="german", data_dir=tmp_path)


def test_load_of_our_own(small_library, tmp_path):
    texts = load("python_source", "train", data_dir=tmp_path / "data")
    assert len(texts) == len(list(texts)) > 0
    assert all(isinstance(text, str) for text in texts)
    split = standard_library.split_of("pkg/__init__.py")
    pairs = load("python_docstrings", split, data_dir=tmp_path / "data")
    assert pairs[0][1] == "    return x + 1\n"
    with pytest.raises(ValueError, match=r"columns \['path', 'text'\].*'{code}'"):
        load("tfds:python_source", "train", text="{code}", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match=r"train\[:0\].*Received: none"):
        load("python_source", "train[:0]", data_dir=tmp_path / "data")
    assert len(tfds.builder("python_source", data_dir=tmp_path / "data").info.splits)


def test_load_of_hugging_face_folders(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    records = [
        {"translation": {"de": f"Wort {i}", "en": f"word {i}"}} for i in range(4)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    templates = {
        "prompt": "English: {translation[en]}\n",
        "answer": "{translation[de]}",
    }
    name, data_dir = f"huggingface:{folder}", str(tmp_path / "cache")
    pairs = load(name, "train", data_dir=data_dir, **templates)
    assert len(pairs) == 4
    assert pairs[1] == ("English: word 1\n", "Wort 1")
    stream = load(name, "train", data_dir=data_dir, streaming=True, **templates)
    assert list(stream) == list(pairs)
    with pytest.raises(ValueError, match=r"translation\[fr\].*'fr' is missing"):
        load(name, "train", data_dir=data_dir, text="{translation[fr]}")
    (folder / "validation.jsonl").write_text(json.dumps(records[0]))
    with pytest.raises(ValueError, match="no data"):
        load(name, "validation[:0]", data_dir=data_dir, **templates)


# A record of each of the paper's sets with its publisher's columns.
PUBLIC = {
    "opencodeinstruct": (
        ("nvidia/OpenCodeInstruct", None),
        {"id": "0", "input": "Add.", "output": "a + b", "unit_tests": "[]"},
        ("Add.\n", "a + b"),
    ),
    "swallowcode": (
        ("tokyotech-llm/swallow-code", "swallow-code"),
        {"text": "x = {}\n", "language": "Python"},
        "x = {}\n",
    ),
    "alma": (
        ("haoranxu/ALMA-Human-Parallel", "de-en"),
        {"translation": {"de": "Wort", "en": "word"}},
        ("Wort\n", "word"),
    ),
    "wmt22": (
        ("haoranxu/WMT22-Test", "de-en"),
        {"de-en": {"de": "Wort", "en": "word"}},
        ("Wort\n", "word"),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_presets_of_public_sets(name, monkeypatch):
    """The sets themselves need a network; their columns are mapped here."""
    wanted, record, document = PUBLIC[name]
    asked = []

    def load_dataset(path, config, **options):
        asked.append((path, config))
        return datasets.Dataset.from_list([record])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load(name, "train")) == [document]
    assert asked == [wanted]


def test_presets_follow_the_languages_asked_for(monkeypatch):
    records = [{"translation": {"zh": "\u8bcd", "en": "word"}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: records)
    assert list(load("alma", "train", config="en-zh")) == [("word\n", "\u8bcd")]
    # Another direction's column is not there.
    with pytest.raises(ValueError, match=r"columns \['translation'\].*'is' is missing"):
        load("alma", "train", config="is-en")


def test_load_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"alma.*'glue'"):
        load("glue", "train")
    with pytest.raises(ValueError, match=r"huggingface.*'kaggle'"):
        load("kaggle:glue", "train")
    with pytest.raises(ValueError, match="streaming=True"):
        load("python_source", "train", streaming=True)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets'.*keras_ebft\[huggingface\]"):
        load("opencodeinstruct", "train")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"'tensorflow-datasets'.*ebft\[data\]"):
        load("tfds:imdb_reviews", "train")


@pytest.mark.parametrize(
    "templates", [{}, {"prompt": "{a}"}, {"text": "{a}", "answer": "{b}"}]
)
def test_templates_that_make_no_document(templates):
    with pytest.raises(ValueError, match="either a template"):
        from_records([{"a": 1}], **templates)


def test_records_may_be_bytes_or_iterables():
    records = [{"a": b"\xc3\xa4"}]
    assert list(from_records(iter(records), text="{a}")) == ["ä"]
    assert from_records(records, text="<{a}>")[0] == "<ä>"


def test_records_with_nothing_in_a_column_are_counted():
    records = [{"a": "x", "b": None}, {"a": "x", "b": "y"}, {"a": None, "b": "y"}]
    documents = from_records(records, prompt="{a}", answer="{b}")
    assert list(documents) == [("", ""), ("x", "y"), ("", "")]
    rows = pack(documents, lambda texts: [[ord(c) for c in t] for t in texts], 4).load()
    assert (rows.report.documents, rows.report.empty_documents) == (3, 2)
    nested = [{"translation": {"en": None}}]
    assert list(from_records(nested, text="{translation[en]}")) == [""]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"a": {"b": None}}, "{a[b]}"),
        ({"a": None}, "{a[b]}"),
        ({"a": None}, "{a!s}"),
        ({"a": None}, "{a!r:>5}"),
        ({"a": float("nan")}, "{a}"),
        ({"a": np.float32("nan")}, "{a:.2f}"),
        ({"a": {"b": float("nan")}}, "{a[b]!s}"),
    ],
)
def test_whatever_is_missing_makes_an_empty_document(record, text):
    assert list(from_records([record], text=f"x {text}")) == [""]
    pair = from_records([record], prompt="x", answer=text)
    assert list(pair) == [("", "")]


def test_missing_values_of_pandas():
    pandas = pytest.importorskip("pandas")
    for value in (pandas.NA, pandas.NaT):
        assert list(from_records([{"a": value}], text="{a}")) == [""]


def test_a_path_that_leads_nowhere_is_named():
    with pytest.raises(ValueError, match=r"a\[b\].*columns \['a'\]"):
        list(from_records([{"a": "text"}], text="{a[b]}"))


def test_records_that_are_not_utf8():
    with pytest.raises(ValueError, match=r"Expected text in UTF-8.*b'\\xff'"):
        list(from_records([{"a": b"\xff"}], text="{a}"))


@pytest.mark.slow
def test_the_real_standard_library(tmp_path):
    """Every file is accounted for, and doctests that came along can be run."""
    builder = prepared("python_source", tmp_path)
    files = list(standard_library.source_files(with_tests=True))
    unreadable = builder.info.metadata["unreadable_files"]
    empty = [f for _, f in files if standard_library.read_source(f) == ""]
    kept = builder.info.splits.total_num_examples
    assert kept + len(unreadable) + len(empty) == len(files)
    assert kept > 1000
    functions = prepared("python_docstrings", tmp_path)
    records = [r for found in every_record(functions).values() for r in found]
    assert len(records) > 3000
    assert sum(bool(record["doctests"]) for record in records) > 30
