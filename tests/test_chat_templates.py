"""Conversations as text."""

import json
import sys

import numpy as np
import pytest

from keras_ebft.data import ChatTemplate, pack
from keras_ebft.training.token_rows import to_token_rows

pytestmark = pytest.mark.backend_independent

SOURCE = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == "tool" %}
        {{ raise_exception("no tools here") }}
    {% endif %}
    {{- "\\n<" + message["role"] + ">" + message["content"] | trim }}
    {{- "</" + message["role"] + ">" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "\\n<assistant>" }}
{%- else %}
    {{- eos_token }}
{%- endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "user", "content": " 1 + 1? "},
    {"role": "assistant", "content": "2"},
]
TEXT = "\n<user>1 + 1?</user>\n<assistant>2</assistant>"


def test_messages_become_text_without_the_tokens_that_preprocessors_add():
    template = ChatTemplate(SOURCE, **TOKENS)
    assert template(MESSAGES) == TEXT
    assert template.prompt(MESSAGES[:1]) == "\n<user>1 + 1?</user>\n<assistant>"
    assert template.pair(MESSAGES) == (
        "\n<user>1 + 1?</user>\n<assistant>",
        "2</assistant>",
    )


@pytest.mark.parametrize("layout", ["file", "settings", "named"])
def test_templates_are_found_in_a_folder(layout, tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    if layout == "file":
        (tmp_path / "chat_template.jinja").write_text(SOURCE)
    elif layout == "settings":
        config["chat_template"] = SOURCE
    else:
        others = {"name": "tool_use", "template": "other"}
        default = {"name": "default", "template": SOURCE}
        config["chat_template"] = [others, default]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_preset(tmp_path)(MESSAGES) == TEXT


def test_a_folder_without_a_template(tmp_path):
    with pytest.raises(ValueError, match=r"has neither.*ChatTemplate\(text\)"):
        ChatTemplate.from_preset(tmp_path)


def test_pairs_become_rows_with_answers():
    def tokenize(texts):
        return [list(text.encode()) for text in texts]

    pair = ChatTemplate(SOURCE, **TOKENS).pair(MESSAGES)
    rows = pack([pair], tokenize, length=64, special_tokens=False).load().arrays
    answer = rows["token_ids"][0][rows["answer_mask"][0].astype(bool)]
    assert bytes(answer.astype("uint8")) == b"2</assistant>"


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("1 + 1?", "list of messages.*'1 \\+ 1"),
        ([], "list of messages"),
        ([{"role": "user"}], "'content'"),
        ([MESSAGES], "one conversation at a time"),
        ([{"role": "tool", "content": "x"}], "no tools here"),
    ],
)
def test_messages_that_do_not_fit_are_refused(messages, match):
    with pytest.raises(ValueError, match=match):
        ChatTemplate(SOURCE)(messages)


def test_pairs_end_with_an_answer_that_follows_its_prompt():
    with pytest.raises(ValueError, match="the last of the user"):
        ChatTemplate(SOURCE).pair(MESSAGES[:1])
    changing = ChatTemplate("{{ messages | length }}")
    with pytest.raises(ValueError, match="alike before and after"):
        changing.pair(MESSAGES)


def test_templates_are_checked_and_run_in_a_sandbox():
    with pytest.raises(ValueError, match="in Jinja"):
        ChatTemplate("{% for %}")
    reaching_out = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        reaching_out(MESSAGES)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"keras_ebft\[chat\]"):
        ChatTemplate(SOURCE)


@pytest.mark.parametrize("kind", [list, np.array])
def test_messages_are_not_taken_for_texts(kind, byte_lm):
    """They would be read as Python writes them."""
    with pytest.raises(TypeError, match=r"strings.*ChatTemplate"):
        to_token_rows(kind([MESSAGES, MESSAGES]), byte_lm)
    with pytest.raises(TypeError, match=r"strings.*ChatTemplate"):
        to_token_rows([MESSAGES, MESSAGES[:1]], byte_lm)
    with pytest.raises(TypeError, match=r"strings.*NoneType"):
        to_token_rows(kind(["text", None]), byte_lm)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_texts_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install .[test]")
    import tokenizers

    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **TOKENS)
    tokenizer.chat_template = SOURCE
    tokenizer.save_pretrained(tmp_path)
    template = ChatTemplate.from_preset(tmp_path)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert f"<s>{template(MESSAGES)}</s>" == expected
    expected = tokenizer.apply_chat_template(
        MESSAGES[:1], tokenize=False, add_generation_prompt=True
    )
    assert f"<s>{template.prompt(MESSAGES[:1])}" == expected
