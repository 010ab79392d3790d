"""Whatever is handed in is used as meant, or refused in words: drawn by `hypothesis`.

A few cases of each property run by default, always the same. `KERAS_EBFT_CASES=20000`
draws so many new ones for each (docs/contributing.md).
"""

import csv
import json
import math
import os
import string
import sys
import tempfile
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_ebft
from keras_ebft.data import (
    ChatTemplate,
    from_path,
    from_records,
    limited_templates,
    pack,
)
from keras_ebft.evaluation import FeatureMatching, Sandbox, TextGenerator
from keras_ebft.training.token_rows import to_token_rows

pytestmark = pytest.mark.backend_independent

CASES = os.environ.get("KERAS_EBFT_CASES")
settings.register_profile(
    "few", max_examples=40, derandomize=True, deadline=None, database=None
)
settings.register_profile(
    "many",
    max_examples=int(CASES or 1),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("many" if CASES else "few")

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**400]),
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, 1e-40, 1e308]),
    st.booleans(),
    st.sampled_from([np.int64(3), np.float32(0.5), np.bool_(True), 1j]),
)
WORDS = st.one_of(
    st.text(max_size=6),
    st.binary(max_size=4),
    st.sampled_from(
        ["stride", "random", "answer_start", "auto", "concat", "last", "rollout"]
    ),
)
ARRAYS = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
    st.sampled_from(["int32", "int64", "uint8", "float32", "bool", "complex64", "U2"]),
    st.integers(0, 3),
)
ATOMS = st.one_of(st.none(), NUMBERS, WORDS, ARRAYS, st.just(object()), st.just(set()))
ANYTHING = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(WORDS, inner, max_size=2),
    ),
    max_leaves=6,
)


def refused(function, /, *arguments, **options):
    """What a call returns, `None` where it is refused in words."""
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert "Expected" in text and "Received" in text, repr(error)
        assert len(text) < 2000, text
        return None


# Rows


@pytest.fixture(scope="module")
def byte_lm():
    return helpers.byte_causal_lm()


@given(x=ANYTHING)
def test_documents_of_any_kind(byte_lm, x):
    rows = refused(to_token_rows, x, byte_lm)
    if rows is not None:
        check_rows(rows)


NAMES = ("token_ids", "padding_mask", "segment_ids", "answer_mask", "anchors")


@given(
    x=st.dictionaries(st.sampled_from(NAMES), st.one_of(ARRAYS, ANYTHING), max_size=5),
    ids=ARRAYS,
)
def test_arrays_of_any_kind(byte_lm, x, ids):
    rows = refused(to_token_rows, {"token_ids": ids, **x}, byte_lm)
    if rows is not None:
        check_rows(rows)
        for name, values in x.items():
            if values is not None:
                np.testing.assert_array_equal(rows[name], np.asarray(values))


def check_rows(rows):
    shape = rows["token_ids"].shape
    for name, values in rows.items():
        kind = "bool" if "mask" in name else "int32"
        assert values.dtype == kind, name
        assert values.shape[0] == shape[0]
        assert name == "anchors" or values.shape == shape
    mask = rows["padding_mask"]
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()


@st.composite
def masks(draw):
    """Masks and segments that are right, and whether they were then made wrong."""
    count, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, length), min_size=count, max_size=count))
    mask = np.arange(length) < np.array(sizes)[:, None]
    segments = np.array(
        draw(
            st.lists(
                st.lists(st.integers(0, 5), min_size=length, max_size=length),
                min_size=count,
                max_size=count,
            )
        )
    )
    rows = {"padding_mask": mask, "segment_ids": segments}
    kind = draw(st.sampled_from(["int32", "int64", "float64", "bool"]))
    rows["padding_mask"] = mask.astype(kind)
    wrong = draw(
        st.sampled_from(["", "", "hole", "number", "negative", "large", "shape", "ids"])
    )
    row = draw(st.integers(0, count - 1))
    rows["token_ids"] = np.zeros((count, length), "int64")
    if wrong == "hole" and length > 1:
        rows["padding_mask"][row] = 0
        rows["padding_mask"][row, draw(st.integers(1, length - 1))] = 1
    elif wrong == "number" and kind != "bool":
        values = [2, -1] if "int" in kind else [0.5, float("nan"), float("inf")]
        rows["padding_mask"][row, 0] = draw(st.sampled_from(values))
    elif wrong in ("negative", "large"):
        value = -1 if wrong == "negative" else 2**31
        rows["segment_ids"] = segments.astype("int64")
        rows["segment_ids"][row, 0] = value
    elif wrong == "shape":
        rows["segment_ids"] = segments[:, :-1]
    elif wrong == "ids":
        rows["token_ids"][row, 0] = draw(st.sampled_from([-1, 10**6, 2**40]))
    else:
        wrong = ""
    return rows, wrong


@given(drawn=masks())
def test_masks_are_kept_or_refused(byte_lm, drawn):
    rows, wrong = drawn
    found = refused(to_token_rows, rows, byte_lm)
    assert (found is None) == bool(wrong)
    if found:
        check_rows(found)
        for name, values in rows.items():
            np.testing.assert_array_equal(found[name], values)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: "<|" not in text
)


@given(
    texts=st.lists(st.one_of(TEXTS, st.tuples(TEXTS, TEXTS)), min_size=1, max_size=4)
)
def test_texts_are_read_as_they_are(byte_lm, texts):
    tokenizer = byte_lm.preprocessor.tokenizer
    byte_lm.preprocessor.sequence_length = 256
    rows = to_token_rows(texts, byte_lm)
    byte_lm.preprocessor.sequence_length = 24
    check_rows(rows)
    for index, text in enumerate(texts):
        ids = rows["token_ids"][index][rows["padding_mask"][index]].tolist()
        prompt, answer = text if isinstance(text, tuple) else ("", text)
        if not answer:
            assert ids == []
            continue
        assert ids[0] == tokenizer.start_token_id
        assert ids[-1] == tokenizer.end_token_id
        assert tokenizer.detokenize(ids[1:-1]) == prompt + answer
        if "answer_mask" in rows:
            first = int(np.argmax(rows["answer_mask"][index]))
            begins = first if prompt else 1
            assert tokenizer.detokenize(ids[1:begins] or []) == prompt
            assert rows["answer_mask"][index][first : len(ids)].all()


@given(
    texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_files_hold_the_texts_that_were_written(texts, kind, quoting):
    """By Python's own writers, with form feeds, quotes, line ends of all kinds."""
    names = ("prompt", "answer")
    records = [dict(zip(names, pair)) for pair in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind}"
        with open(path, "w", encoding="utf-8", newline="") as file:
            if kind in ("csv", "tsv"):
                delimiter = "\t" if kind == "tsv" else ","
                writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
                writer.writerows([names, *texts])
            elif kind == "json":
                json.dump(records, file, ensure_ascii=False)
            else:
                lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
                file.writelines(lines)
        # Python 3.10 reads no NUL in a table.
        texts_are_read = kind in ("jsonl", "json") or "\0" not in str(texts)
        if texts_are_read or sys.version_info >= (3, 11):
            assert list(from_path(path)) == texts
            assert list(from_path(path, text="{answer}")) == [a for _, a in texts]


@given(
    content=st.lists(
        st.sampled_from(
            [
                "text",
                "a",
                ",",
                "\t",
                '"',
                "\n",
                "\r",
                "\x0c",
                "\0",
                "{",
                "}",
                ":",
                "[1]",
            ]
        ),
        max_size=12,
    ).map("".join),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json"]),
)
def test_files_of_any_content(content, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(
            f"text\n{content}".encode() if "sv" in kind else content.encode()
        )
        documents = refused(from_path, path, text="{text}")
        for index in range(len(documents) if documents is not None else 0):
            found = refused(documents.__getitem__, index)
            assert found is None or isinstance(found, str)


# Packing

IDS = st.lists(st.integers(0, 99), max_size=14).map(lambda ids: np.array(ids, "int32"))


@given(
    documents=st.lists(st.one_of(IDS, st.tuples(IDS, IDS)), min_size=1, max_size=12),
    length=st.integers(1, 9),
    strategy=st.sampled_from(["best_fit", "in_order"]),
    long_documents=st.sampled_from(["split", "drop"]),
    count=st.integers(1, 3),
    window_rows=st.integers(1, 3),
    resume=st.integers(0, 8),
)
def test_every_token_is_in_one_row(
    documents, length, strategy, long_documents, count, window_rows, resume
):
    options = {
        "strategy": strategy,
        "long_documents": long_documents,
        "window_rows": window_rows,
    }
    found, expected = [], []
    for index in range(count):
        stream = pack(documents, None, length, shard=(index, count), **options)
        own = documents[index::count]
        wholes = [np.concatenate(d) if isinstance(d, tuple) else d for d in own]
        empty = [not len(d[-1] if isinstance(d, tuple) else d) for d in own]
        long = [len(w) > length and long_documents == "drop" for w in wholes]
        kept = [w for w, e, x in zip(wholes, empty, long) if not (e or x)]
        if not kept:
            assert refused(stream.load) is None
            continue
        rows = stream.load()
        check_rows(rows.arrays)
        assert rows.report.documents == len(own)
        assert rows.report.empty_documents == sum(empty)
        assert rows.report.tokens == sum(map(len, kept))
        for one in (rows[i] for i in range(len(rows))):
            found += tokens_of(one)
        expected += [int(token) for document in kept for token in document]
        answers = sum(int(one["answer_mask"].sum()) for one in rows)
        assert answers == sum(
            len(d[-1]) if isinstance(d, tuple) else len(d)
            for d, e, x in zip(own, empty, long)
            if not (e or x)
        )
        again = pack(documents, None, length, shard=(index, count), **options)
        check_resumes(again, rows, min(resume, len(rows) - 1))
    assert sorted(found) == sorted(expected)


def tokens_of(row):
    """Token ids of a row whose segments are numbered as they should be."""
    segments, mask = row["segment_ids"], row["padding_mask"]
    np.testing.assert_array_equal(segments > 0, mask)
    assert set(np.diff(segments[mask]).tolist()) <= {0, 1}
    return row["token_ids"][mask].tolist()


def check_resumes(stream, rows, after):
    iterator = iter(stream)
    for _ in range(after):
        next(iterator)
    state = stream.get_state()
    stream.set_state(state)
    rest = list(stream)
    assert len(rest) == len(rows) - after
    for one, index in zip(rest, range(after, len(rows))):
        for name, values in rows[index].items():
            np.testing.assert_array_equal(one[name], values)


@given(documents=ANYTHING, tokenizer=st.one_of(st.none(), ANYTHING), data=st.data())
def test_packing_of_any_kind(documents, tokenizer, data):
    options = data.draw(
        st.dictionaries(
            st.sampled_from(
                ["strategy", "long_documents", "special_tokens", "shard", "window_rows"]
            ),
            ANYTHING,
            max_size=2,
        )
    )
    length = data.draw(st.one_of(st.integers(1, 5), ANYTHING))
    if isinstance(length, (int, np.integer)) and length > 100:
        length = 100
    if isinstance(options.get("window_rows"), int) and options["window_rows"] > 9:
        options["window_rows"] = 9
    stream = refused(pack, documents, tokenizer, length, **options)
    if stream is not None:
        rows = refused(stream.load)
        if rows is not None:
            check_rows(rows.arrays)


# Records and chats

PIECES = ["{a}", "{b[c]}", "{a!r}", "{a!s}", "{b}", "{{", "}}", "{", "}", "x", "{d}"]


@given(
    template=st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    record=st.fixed_dictionaries(
        {"a": ATOMS, "b": st.one_of(ATOMS, st.fixed_dictionaries({"c": ATOMS}))}
    ),
)
def test_records_of_any_kind(template, record):
    documents = refused(from_records, [record], text=template)
    found = None if documents is None else refused(documents.__getitem__, 0)
    if found:
        assert isinstance(found, str)
        # What is missing is never written out.
        fields = [name for _, name, *_ in string.Formatter().parse(template)]
        assert not ("a" in fields and is_nothing(record["a"])), found


def is_nothing(value):
    return value is None or (isinstance(value, float) and math.isnan(value))


FRAGMENTS = (
    "{{ messages[0].content }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if loop.last %}",
    "{% else %}",
    "{% endif %}",
    "{{ m.role ~ m['content'] }}",
    "{% for i in range(999) %}",
    "{{ bos_token }}",
    "{{ x }}",
    "{% set x = x ~ x %}",
    "{% set x = messages | tojson %}",
    "{% set s = namespace(x=3) %}",
    "{% set s.x = s.x * s.x %}",
    "{{ s.x ** 99 }}",
    "{{ 'a' * 999999 }}",
    "{% macro f(n) %}",
    "{% endmacro %}",
    "{{ f(f(3)) }}",
    "{{ loop(messages) }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{{ [] | first }}",
    "{{ 'a' | int(base=99) }}",
    "{{ messages | sort(attribute='role') | length }}",
    "{{ ''.join(messages) }}",
    "{{ '%d' % 'a' }}",
    "{{ '{}'.format() }}",
    "{% break %}",
    "text",
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": TEXTS, "content": st.one_of(TEXTS, st.none())}),
    min_size=1,
    max_size=3,
)


@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=9), messages=MESSAGES)
def test_templates_of_any_kind(fragments, messages):
    template = refused(ChatTemplate, "".join(fragments))
    if template is None:
        return
    start = time.thread_time()
    text = refused(template, messages)
    assert time.thread_time() - start < limited_templates.MOST_SECONDS + 2.0
    assert text is None or len(text) <= limited_templates.MOST_CHARACTERS


PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@given(contents=st.lists(TEXTS, min_size=2, max_size=4), keep=st.booleans())
def test_chats_are_written_as_they_are(contents, keep):
    messages = [{"role": "user", "content": text} for text in contents]
    messages[-1]["role"] = "assistant"
    template = ChatTemplate(PLAIN, keep_start_token=keep, bos_token="<s>")
    expected = "".join(f"<{m['role']}>{m['content']}" for m in messages)
    start = "<s>" if keep else ""
    assert template(messages) == start + expected
    assert "".join(template.pair(messages)) == start + expected
    assert template.pair(messages)[1] == contents[-1]


@given(messages=ANYTHING, template=ANYTHING)
def test_messages_of_any_kind(messages, template):
    found = refused(ChatTemplate(PLAIN), messages)
    assert found is None or isinstance(found, str)
    refused(ChatTemplate, template)


# Constructors

PARTS = {
    keras_ebft.BlockGeometry: "length context_length rollout_length stride",
    keras_ebft.BlockSampler: "rollout_length stride context_length num_samples "
    "temperature top_k top_p anchors num_anchors stop_token_ids",
    keras_ebft.ReplaySampler: "token_ids stride context_length temperature top_p",
    keras_ebft.FeatureNetwork: "layers mode pooling network ema_decay",
    keras_ebft.FeatureMatchingReward: "alignment_weight diversity_weight whitening "
    "normalize",
    keras_ebft.CharacteristicFunctionReward: "alignment_weight diversity_weight "
    "whitening num_frequencies bandwidth seed",
    keras_ebft.VerifierReward: "fn decode",
    keras_ebft.RewardSum: "rewards weights",
    keras_ebft.Critic: "selection optimizer train_features",
    keras_ebft.callbacks.Measure: "function every prefix",
    keras_ebft.TrainingCheckpoint: "filepath save_freq strict",
    Sandbox: "wall_seconds cpu_seconds memory_bytes processes disk_bytes open_files "
    "output_bytes require",
}
REQUIRED = {
    keras_ebft.BlockGeometry: {"length": 40},
    keras_ebft.ReplaySampler: {"token_ids": np.zeros((1, 2, 3, 4), "int32")},
    keras_ebft.VerifierReward: {"fn": len},
    keras_ebft.RewardSum: {"rewards": [keras_ebft.FeatureMatchingReward()]},
    keras_ebft.callbacks.Measure: {"function": len},
    keras_ebft.TrainingCheckpoint: {"filepath": "run.weights.h5"},
}


@given(part=st.sampled_from(list(PARTS)), data=st.data())
def test_constructors_of_any_kind(part, data):
    names = st.sampled_from(PARTS[part].split())
    values = st.one_of(NUMBERS, WORDS, ANYTHING)
    given_options = data.draw(st.dictionaries(names, values, max_size=3))
    built = refused(part, **{**REQUIRED.get(part, {}), **given_options})
    if built is not None and hasattr(built, "get_config"):
        config = built.get_config()
        assert set(given_options) <= set(config) | {"geometry", "network"}


# What is made of a language model, and of parts that are right by themselves.
WITH_MODEL = {
    keras_ebft.EBFTModel: "sampler feature_network reward advantage policy_weight "
    "ce_weight kl_weight kl_estimator entropy_weight policy_loss updates_per_rollout "
    "clip_range critic rematerialize micro_batches seed",
    TextGenerator: "max_length num_samples temperature batch_size seed max_new_tokens",
    FeatureMatching: "rollout_lengths num_samples seed",
}
GOOD = st.sampled_from(
    [
        keras_ebft.BlockSampler(num_samples=2, stop_token_ids=(3,)),
        keras_ebft.BlockSampler(num_samples=1),
        keras_ebft.FeatureNetwork(layers=(1,), pooling="token"),
        keras_ebft.CharacteristicFunctionReward(),
        keras_ebft.VerifierReward(len, decode=False),
        keras_ebft.Critic(),
        *("rloo", "group_norm", "reinforce", "k1", "k3", "token", "sequence"),
        (1, 3),
    ]
)


@given(part=st.sampled_from(list(WITH_MODEL)), data=st.data())
def test_what_is_made_of_a_model_of_any_kind(byte_lm, part, data):
    names = st.sampled_from(WITH_MODEL[part].split())
    values = st.one_of(GOOD, NUMBERS, WORDS, ANYTHING)
    options = data.draw(st.dictionaries(names, values, max_size=3))
    if part is FeatureMatching and data.draw(st.booleans()):
        options["rollout_lengths"] = (2, 3)
    if part is TextGenerator:
        options = {"max_length": 9, **options}
    built = refused(part, byte_lm, **options)
    if built is not None:
        assert len(repr(built)) < 4000
        if part is keras_ebft.EBFTModel:
            assert set(options) <= set(built.get_config())


# Rollouts


@pytest.fixture(scope="module")
def rewarded():
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=3, context_length=3, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    return keras_ebft.EBFTModel(
        helpers.llama(num_layers=1, hidden_dim=8), sampler, network, seed=0
    )


# Two rows of 9 tokens hold 2 blocks each.
ROLLED_OUT = (2, 2, 2, 2)
WRONG = {
    "below": lambda ids: (ids - helpers.VOCABULARY, None),
    "beyond": lambda ids: (ids + helpers.VOCABULARY, None),
    "wrapped": lambda ids: (ids + 2**32, None),
    "floats": lambda ids: (ids + 0.0, None),
    "truths": lambda ids: (ids > 0, None),
    "blocks": lambda ids: (ids[:, :, :1], None),
    "rows": lambda ids: (ids[:1], None),
    "half places": lambda ids: (ids, np.full((2, 2), 3.5)),
    "places beyond": lambda ids: (ids, np.full((2, 2), 9)),
    "places of one": lambda ids: (ids, np.full((1, 2), 3)),
}


@given(
    ids=st.lists(st.integers(0, helpers.VOCABULARY - 1), min_size=16, max_size=16).map(
        lambda ids: np.array(ids).reshape(ROLLED_OUT)
    ),
    anchors=st.one_of(
        st.none(),
        st.lists(st.sampled_from([-1, 1, 3, 6, 8]), min_size=4, max_size=4).map(
            lambda places: np.array(places).reshape(2, 2)
        ),
    ),
    kind=st.sampled_from(["int32", "int64", "uint8"]),
    wrong=st.sampled_from(["", "", *WRONG]),
)
def test_rollouts_are_rewarded_or_refused(rewarded, ids, anchors, kind, wrong):
    ids = ids.astype(kind if not wrong else "int64")
    if wrong:
        ids, other = WRONG[wrong](ids)
        anchors = anchors if other is None else other
    given_rollouts = ids if anchors is None else {"token_ids": ids, "anchors": anchors}
    x = helpers.documents(2, 9)
    found = refused(rewarded.rewards, x, given_rollouts)
    assert (found is None) == bool(wrong)
    if found is not None:
        reward = helpers.to_numpy(found["reward"])
        assert reward.shape == ROLLED_OUT[:3] and np.isfinite(reward).all()


@given(rollouts=ANYTHING, places=ANYTHING)
def test_rollouts_of_any_kind(rewarded, rollouts, places):
    x = helpers.documents(2, 9)
    for one in (rollouts, {"token_ids": rollouts, "anchors": places}):
        assert refused(rewarded.rewards, x, one) is None
