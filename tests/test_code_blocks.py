"""Every block of Python in README and docs runs.

What a reader brings is stood in for: models of KerasHub, SmolLM2 and GGUF files are a
tiny Llama that reads bytes; data sets by name are a list of texts; `wandb` and `mlflow`
are objects that take everything. Names that a page takes for granted (`texts`, `model`,
`held_out`) are given. All else is what the page says, in the order in which it says it.
"""

import ast
import functools
import json
import logging
import os
import re
import sys
from pathlib import Path
from unittest import mock

import helpers
import keras
import keras_hub
import numpy as np
import pytest

import keras_ebft

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Its blocks start processes and ask for devices: tests/test_replicas.py and
# tests/test_jax_devices.py do.
DEVICES = ROOT / "docs" / "distribution.md"
TEXTS = [f"def f{i}(x):\n    return x + {i}  # and so it goes on" for i in range(4)]
PAIRS = [(f"{i} + 1 = ", f"{i + 1}, which is more") for i in range(4)]

pytestmark = [
    pytest.mark.on_torch,
    # What KerasHub says of tiny tokenizers, and Keras of models on their way.
    pytest.mark.filterwarnings("default"),
]


def blocks(path):
    """The blocks of a page, each with the number of its first line."""
    text = path.read_text("utf-8")
    for found in BLOCK.finditer(text):
        indent, code = found[1], found[2]
        code = "".join(line.removeprefix(indent) for line in code.splitlines(True))
        yield text.count("\n", 0, found.start()) + 2, code


def pages():
    """README and the pages that have blocks which one process can run."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if any(blocks(path)) and path != DEVICES]


# What users read first; all pages take a minute of processor time.
QUICK = ("README.md", "concepts.md", "kernels.md")
PAGES = [
    pytest.param(
        path,
        id=str(path.relative_to(ROOT)),
        marks=[] if path.name in QUICK else [pytest.mark.slow],
    )
    for path in pages()
]


@functools.cache
def byte_preprocessor():
    """A tokenizer takes longer to make than a model."""
    tokenizer = helpers.byte_causal_lm().preprocessor.tokenizer
    return keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=44)


def tiny(*args, **options):
    """A Llama of one layer that reads bytes, whatever was asked for."""
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=byte_preprocessor().tokenizer.vocabulary_size(),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=byte_preprocessor())


class Template:
    """A chat template that puts messages one after another."""

    def __call__(self, messages):
        return "".join(message["content"] for message in messages)

    def pair(self, messages):
        return self(messages[:-1]), messages[-1]["content"]

    prompt = __call__


def given(causal_lm, model):
    """What pages take for granted."""
    tokenizer = causal_lm.preprocessor.tokenizer
    conversation = [
        {"role": "user", "content": "one more than 3?"},
        {"role": "assistant", "content": "4, and no other"},
    ]

    def fn(prompts, completions, targets):
        return [[[len(text) for text in k] for k in n] for n in completions]

    return {
        "keras": keras,
        "keras_hub": keras_hub,
        "keras_ebft": keras_ebft,
        "np": np,
        "logging": logging,
        "causal_lm": causal_lm,
        "model": model,
        "tokenizer": tokenizer,
        "texts": TEXTS,
        "more_texts": TEXTS[:2],
        "held_out": TEXTS[:2],
        "pairs": PAIRS,
        "rows": packed_pairs(),
        "frame": [{"question": q, "answer": a} for q, a in PAIRS],
        "conversations": [conversation, conversation],
        "messages": conversation[:1],
        "fn": fn,
        "other": {"loss": [1.0], "feature_matching_loss": [0.5]},
    }


@functools.cache
def packed_pairs():
    tokenizer = byte_preprocessor().tokenizer
    return keras_ebft.data.pack(PAIRS, tokenizer, length=32).load()


@pytest.fixture
def as_it_was_logged():
    """Pages turn on what is logged; tests after them expect that nobody has."""
    loggers = logging.getLogger(), logging.getLogger("keras_ebft")
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def reader(monkeypatch, tmp_path, as_it_was_logged):
    """Someone who has the models, files and accounts that pages ask for."""
    monkeypatch.chdir(tmp_path)
    # Pages set it; the backend of this process stays what it is.
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    for name in ("CausalLM", "Gemma3CausalLM"):
        monkeypatch.setattr(getattr(keras_hub.models, name), "from_preset", tiny)
    loaded = lambda *args: byte_preprocessor().tokenizer  # noqa: E731
    monkeypatch.setattr(keras_hub.models.Gemma3Tokenizer, "from_preset", loaded)
    monkeypatch.setattr(keras_ebft.models, "smollm2", tiny)
    monkeypatch.setattr(keras_ebft.models, "from_gguf", tiny)
    monkeypatch.setattr(keras_ebft.models, "chat_template", lambda lm: Template())
    template = classmethod(lambda cls, path: Template())
    monkeypatch.setattr(keras_ebft.data.ChatTemplate, "from_preset", template)
    monkeypatch.setattr(keras_ebft.data, "load", lambda *args, **options: TEXTS)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    with open("notes.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with open("questions.jsonl", "w") as file:
        for question, answer in PAIRS:
            record = {"question": question, "answer": answer}
            file.write(json.dumps(record) + "\n")
    os.mkdir("run")


@pytest.mark.parametrize("path", PAGES)
def test_blocks_of_a_page(reader, path):
    names = {}
    for line, code in blocks(path):
        causal_lm = tiny()
        if "model" in code:
            model = keras_ebft.EBFTModel(causal_lm, seed=0)
            model.compile()
        else:
            model = None
        names |= given(causal_lm, model)
        # As many lines above as in the page, so that errors say where.
        program = compile("\n" * (line - 1) + code, str(path), "exec")
        exec(program, names)


def test_blocks_are_found():
    assert [ast.parse(code) for _, code in blocks(DEVICES)]
    assert sum(1 for path in pages() for _ in blocks(path)) > 35


@pytest.mark.slow
def test_the_tutorial_runs(reader):
    """Its cells in their order, in one place, as in a notebook."""
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text("utf-8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    # Nothing of an earlier run is kept.
    assert not any(cell["outputs"] for cell in cells)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["history"].history["feature_matching_loss"]
    assert Path("tuned.keras").exists()


HEADER = ("Title", "Author", "Date created", "Last modified", "Description")


@pytest.mark.slow
def test_the_example_for_keras_io_runs(reader, capsys):
    """And has the format: a header, then texts as strings between the code."""
    source = (ROOT / "examples" / "keras_io.py").read_text("utf-8")
    first, *others = [
        node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    fields = dict(line.split(": ", 1) for line in first.strip().splitlines())
    assert set(HEADER) <= set(fields)
    assert fields["Accelerator"] in ("GPU", "TPU", "None")
    heads = [text.strip().splitlines()[0] for text in others]
    assert sum(head.startswith("## ") for head in heads) > 4
    # Rows as short as the stand-in's texts, and few.
    source = source.replace("LENGTH = 256", "LENGTH = 40")
    source = source.replace("STEPS = 100\nEPOCHS = 5", "STEPS = EPOCHS = 1")
    exec(compile(source, "keras_io.py", "exec"), {"__name__": "__main__"})
    assert "feature_matching_loss" in capsys.readouterr().out
    assert Path("adapters.lora.h5").exists()
