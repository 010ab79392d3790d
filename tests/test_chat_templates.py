"""Conversations as text."""

import json
import sys
import time

import numpy as np
import pytest

from keras_ebft.data import ChatTemplate, limited_templates, pack
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
TEXT = "\n<user>1 + 1?</user>\n<assistant>2</assistant></s>"


def test_messages_become_text_without_the_start_token_that_preprocessors_add():
    template = ChatTemplate(SOURCE, **TOKENS)
    assert template(MESSAGES) == TEXT
    assert template.prompt(MESSAGES[:1]) == "\n<user>1 + 1?</user>\n<assistant>"
    assert template.pair(MESSAGES) == (
        "\n<user>1 + 1?</user>\n<assistant>",
        "2</assistant></s>",
    )


def test_the_start_token_stays_for_preprocessors_that_add_none(tmp_path):
    template = ChatTemplate(SOURCE, keep_start_token=True, **TOKENS)
    assert template(MESSAGES) == "<s>" + TEXT
    assert template.pair(MESSAGES)[0] == "<s>\n<user>1 + 1?</user>\n<assistant>"
    (tmp_path / "chat_template.jinja").write_text(SOURCE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    found = ChatTemplate.from_preset(tmp_path, keep_start_token=True)
    assert found(MESSAGES) == "<s>" + TEXT
    with pytest.raises(TypeError, match="keep_start_token"):
        ChatTemplate(SOURCE, keep_start_token="yes")


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
    assert bytes(answer.astype("uint8")) == b"2</assistant></s>"


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


def test_the_end_of_a_turn_stays_where_the_tokenizers_end_token_is_another(byte_lm):
    tokenizer = byte_lm.preprocessor.tokenizer
    turn = tokenizer.token_to_id("<|eot_id|>")
    assert turn != tokenizer.end_token_id
    for eos, ends in (
        ("<|eot_id|>", [turn, tokenizer.end_token_id]),
        (tokenizer.end_token, [tokenizer.token_to_id(">"), tokenizer.end_token_id]),
    ):
        template = ChatTemplate(SOURCE, bos_token=tokenizer.start_token, eos_token=eos)
        byte_lm.preprocessor.sequence_length = 64
        rows = to_token_rows([template.pair(MESSAGES)], byte_lm)
        byte_lm.preprocessor.sequence_length = 24
        assert rows["token_ids"][0, -2:].tolist() == ends
        assert rows["answer_mask"][0, -2:].all()


TOO_MUCH = (
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ ([1] * 10**10) | length }}",
    "{{ 10**(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '\\n' | indent(10**10) }}",
    "{{ 'a\\tb'.expandtabs(10**10) }}",
    "{{ [1] | batch(10**10, 1) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ lipsum(n=10**7) }}",
    "{% for i in range(9999) %}{% for j in range(9999) %}aaaaaaaa{% endfor %}"
    "{% endfor %}",
    "{% set s = namespace(x='aa') %}{% for i in range(40) %}{% set s.x = s.x + s.x %}"
    "{% endfor %}",
    "{% set s = namespace(x='aa') %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}"
    "{% endfor %}",
    "{% set s = namespace(x='aa') %}{% for i in range(40) %}"
    "{% set s.x = s.x | replace('a', 'aa') %}{% endfor %}",
    "{% set s = namespace(x='aa') %}{% for i in range(40) %}"
    "{% set s.x = [s.x, s.x] | join %}{% endfor %}",
    "{% set s = namespace(x='aa') %}{% for i in range(40) %}"
    "{% set s.x = s.x.join([s.x, s.x]) %}{% endfor %}",
    "{% set s = namespace(x=7) %}{% for i in range(40) %}{% set s.x = s.x * s.x %}"
    "{% endfor %}",
    "{% set s = namespace(x=7) %}{% for i in range(9) %}{% set s.x = s.x ** 900 %}"
    "{% endfor %}",
)


@pytest.mark.parametrize("source", TOO_MUCH)
def test_a_template_cannot_take_all_memory(source):
    with pytest.raises(ValueError, match="most"):
        ChatTemplate(source)(MESSAGES)


TOO_LONG = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
)


@pytest.mark.parametrize("source", TOO_LONG)
def test_a_template_cannot_take_all_time(source, monkeypatch):
    monkeypatch.setattr(limited_templates, "MOST_SECONDS", 0.1)
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"more than 0\.1 s, the most"):
        ChatTemplate(source)(MESSAGES)
    assert time.thread_time() - start < 2.0


@pytest.mark.parametrize("source", ["{% break %}", "{% continue %}", "{{ x"])
def test_a_template_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match="Expected a template in Jinja"):
        ChatTemplate(source)


def test_a_template_that_calls_itself_without_end_is_refused():
    source = "{% for m in [[[]]] recursive %}{{ loop([[[]]]) }}{% endfor %}"
    with pytest.raises(ValueError, match="recursion"):
        ChatTemplate(source)(MESSAGES)


def test_loops_know_where_they_are():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}"
        "{{ 'last' if loop.last else loop.nextitem.role }} {% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}none{% endfor %}"
    )
    assert ChatTemplate(source)(MESSAGES) == "1/2assistant 2/2last none"


def test_what_templates_do_with_short_texts_is_left_alone():
    source = (
        "{{ 'ab' * 2 }}{{ 'a' ~ 1 ~ 'b' }}{{ '%3d' % 7 }}{{ '{:>3}'.format('x') }}"
        "{{ ['a', 'b'] | join('-') }}{{ 'a\nb' | indent(2) }}{{ 2 ** 3 }}{{ 7 % 4 }}"
        "{{ 'x'.replace('x', 'y') }}{{ [1] + [2] }}{{ 'q' | center(3) }}"
    )
    expected = "ababa1b  7  xa-ba\n  b83y[1, 2] q "
    assert ChatTemplate(source)(MESSAGES) == expected


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
    assert f"<s>{template(MESSAGES)}" == expected
    expected = tokenizer.apply_chat_template(
        MESSAGES[:1], tokenize=False, add_generation_prompt=True
    )
    assert f"<s>{template.prompt(MESSAGES[:1])}" == expected
