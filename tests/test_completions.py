"""What the model writes while it trains: right, kept, and no part of training."""

import html
import json
import re
import sys
import types

import keras
import keras_hub
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft
from keras_ebft.callbacks import Completions
from keras_ebft.callbacks.completion_writers import (
    COLUMNS,
    MlflowTable,
    WandbTable,
    _markdown,
)

# Of bytes, one token each.
TEXTS = ["ba [red]cba c", "c bca cbb cac"]
REWARDS = ("alignment", "diversity", "reward", "advantage")


def reader():
    """A small language model that reads and writes bytes."""
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
        tokenizer, sequence_length=14, add_end_token=False
    )
    causal_lm = keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)
    random = np.random.default_rng(0)
    causal_lm.set_weights(
        [random.normal(size=w.shape).astype("float32") for w in causal_lm.get_weights()]
    )
    return causal_lm


def build(causal_lm=None, rate=0.1, **sampling):
    settings = {"rollout_length": 3, "stride": 5, "context_length": 4, **sampling}
    model = keras_ebft.EBFTModel(
        causal_lm or reader(),
        keras_ebft.BlockSampler(num_samples=2, **settings),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
    )
    model.compile(keras.optimizers.SGD(rate))
    return model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def places(records):
    return [(r["step"], r["row"], r["anchor"]) for r in records]


def weights(model):
    return [to_numpy(w) for w in model.causal_lm.weights]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs of three steps, once with completions and once without."""
    path = tmp_path_factory.mktemp("run") / "new" / "completions.jsonl"
    shown = Completions(
        TEXTS, every=2, unit="steps", at_start=True, path=path, show=False
    )
    models = [build(), build()]
    for model, callbacks in zip(models, ([shown], [])):
        model.fit(
            TEXTS * 3,
            batch_size=2,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    return models, path, shown


@pytest.mark.not_on_tensorflow
def test_blocks_are_what_rollout_and_rewards_say(run):
    model = run[0][0]
    blocks = model.completions(TEXTS, seed=3)
    rollouts = model.rollout(TEXTS, seed=3)
    anchors = to_numpy(rollouts["anchors"])
    rewards = {k: to_numpy(v) for k, v in model.rewards(TEXTS, rollouts).items()}
    log_prob = to_numpy(rollouts["log_prob"])
    assert [(b["row"], b["anchor"]) for b in blocks] == [
        (row, anchors[row, k]) for row, k in np.argwhere(anchors >= 0)
    ]
    for block in blocks:
        row = block["row"]
        assert TEXTS[row].startswith(block["prompt"] + block["truth"])
        # One token per byte, and the start token.
        assert len(block["prompt"]) == block["anchor"] - 1
        assert len(block["truth"]) == 3
        k = list(anchors[row]).index(block["anchor"])
        for j, rollout in enumerate(block["rollouts"]):
            for name in REWARDS:
                expected = rewards[name][row, j, k]
                assert rollout[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            np.testing.assert_allclose(
                rollout["log_prob"], log_prob[row, j, k], rtol=1e-5, atol=1e-5
            )
            assert len(rollout["tokens"]) == 3
            assert rollout["ended"] is None


@pytest.mark.not_on_tensorflow
def test_training_ends_with_the_same_weights_bit_for_bit(run):
    (shown, plain), _, _ = run
    for one, other in zip(weights(shown), weights(plain)):
        np.testing.assert_array_equal(one, other)
    assert shown.steps_trained == 6


@pytest.mark.not_on_tensorflow
def test_lines_are_kept_by_step_row_and_anchor(run):
    _, path, _ = run
    found = lines(path)
    expected = [
        (step, row, anchor)
        for step in (0, 2, 4, 6)
        for row in (0, 1)
        for anchor in (4, 9)
    ]
    assert places(found) == expected
    assert [record["epoch"] for record in found[::4]] == [0, 0, 1, 1]
    # The same numbers are drawn, by weights that have changed.
    assert found[0]["rollouts"] != found[-4]["rollouts"]
    assert found[0]["truth"] == found[4]["truth"]


@pytest.mark.not_on_tensorflow
def test_another_fit_adds_lines_and_leaves_those_that_are_there(run):
    (model, _), path, shown = run
    before = path.read_bytes()
    # As a process leaves it that was killed while it wrote.
    path.write_bytes(before[:-9])
    model.fit(TEXTS, batch_size=2, epochs=2, verbose=0, callbacks=[shown])
    after = path.read_bytes()
    assert after.startswith(before[:-9] + b"\n")
    added = [json.loads(line) for line in after[len(before) - 8 :].splitlines()]
    # Steps count on: 0 of this fit is 6 of the model's life.
    assert sorted({record["step"] for record in added}) == [6, 8]


def test_nothing_is_computed_where_it_does_not_fire(run, monkeypatch):
    (model, _), path, _ = run

    def fail(*_):
        raise InterruptedError("completions were computed")

    monkeypatch.setitem(model._compiled, "completions", fail)
    silent = Completions(TEXTS, every=9, path=path, show=False)
    model.fit(TEXTS, batch_size=2, epochs=2, verbose=0, callbacks=[silent])
    with pytest.raises(InterruptedError):
        model.fit(
            TEXTS, batch_size=2, verbose=0, callbacks=[Completions(TEXTS, path=path)]
        )


class Interruption(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptedError


@pytest.mark.on_torch
def test_steps_count_on_where_training_resumes(tmp_path):
    path = tmp_path / "completions.jsonl"

    def run(*others):
        shown = Completions(TEXTS[:1], 2, "steps", path=path, show=False)
        saved = keras_ebft.TrainingCheckpoint(tmp_path / "run.weights.h5", save_freq=1)
        callbacks = [saved, shown, *others]
        build().fit(TEXTS, batch_size=1, epochs=2, verbose=0, callbacks=callbacks)

    with pytest.raises(InterruptedError):
        run(Interruption(3))
    run()
    # The third step, which the second run passes over, is not counted again.
    assert places(lines(path)) == [(2, 0, 4), (2, 0, 9), (4, 0, 4), (4, 0, 9)]


def test_the_table_shows_texts_as_they_are(run, capsys):
    (model, _), _, _ = run
    blocks = model.completions(TEXTS, seed=0)
    shown = Completions(TEXTS)
    blocks[0]["truth"] = "[red]a\n"
    for writer in shown.writers:
        writer.write(5, 0, blocks[:1])
    text = capsys.readouterr().out
    assert "step 5, row 0, anchor 4" in text
    assert "[red]a\\n" in text
    assert f"{blocks[0]['rollouts'][1]['reward']:.3f}" in text


def test_tensorboard_gets_the_texts(run, tmp_path):
    pytest.importorskip("tensorboardX")
    (model, _), _, _ = run
    shown = Completions(TEXTS, show=False, tensorboard=tmp_path)
    model.fit(TEXTS, batch_size=2, verbose=0, callbacks=[shown])
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    for row in (0, 1):
        assert f"completions/row_{row}".encode() in data
    assert b"<code>" in data
    assert b"[red]" not in data


@pytest.mark.backend_independent
def test_texts_are_no_markdown():
    text = "a_b | <i> & #1 `x` \\\n"
    block = {"row": 0, "anchor": 4, "prompt": text, "truth": text, "rollouts": []}
    found = _markdown(block)
    assert html.unescape(found).count("a_b | <i> & #1 `x` \\\\n") == 2
    inside = re.findall("<code>(.*?)</code>", found)
    assert len(inside) == 2
    assert not any(set(part) & set("|<>`_") for part in inside)


class FakeWandb(types.SimpleNamespace):
    """What is used of W&B: tables that a run is given."""

    def __init__(self):
        self.logged = []
        run = types.SimpleNamespace(log=self.logged.append)
        super().__init__(run=run, Table=lambda **table: table)


def test_tables_of_wandb_and_mlflow(run, monkeypatch):
    blocks = run[0][0].completions(TEXTS, seed=0)
    wandb, tables = FakeWandb(), []
    mlflow = types.SimpleNamespace(log_table=lambda *table: tables.append(table))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for writer in (WandbTable(), MlflowTable()):
        writer.begin()
        writer.write(7, 0, blocks)
    (logged,) = wandb.logged
    assert logged["completions_step"] == 7
    assert logged["completions"]["columns"] == list(COLUMNS)
    rows = logged["completions"]["data"]
    assert len(rows) == sum(len(block["rollouts"]) for block in blocks)
    first = blocks[0]["rollouts"][0]
    assert rows[0][:6] == [
        7,
        0,
        4,
        blocks[0]["prompt"],
        blocks[0]["truth"],
        first["text"],
    ]
    assert rows[0][6:] == [first[name] for name in REWARDS]
    ((data, file),) = tables
    assert file == "completions.json"
    assert [list(row) for row in zip(*data.values())] == rows
    wandb.run = None
    with pytest.raises(ValueError, match=r"run of W&B.*wandb\.init"):
        WandbTable().begin()


@pytest.mark.backend_independent
def test_refusals(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="every=0"):
        Completions(TEXTS, every=0)
    with pytest.raises(ValueError, match=r"unit.*epochs.*steps.*days"):
        Completions(TEXTS, unit="days")
    with pytest.raises(ValueError, match="place for completions"):
        Completions(TEXTS, show=False)
    with pytest.raises(TypeError, match="wandb='yes'"):
        Completions(TEXTS, wandb="yes")
    asked = {"tensorboardX": {"tensorboard": tmp_path}}
    asked |= {name: {name: True} for name in ("wandb", "mlflow")}
    for package, options in asked.items():
        monkeypatch.setitem(sys.modules, package, None)
        (extra,) = options
        with pytest.raises(ImportError, match=rf"{package}.*keras_ebft\[{extra}\]"):
            Completions(TEXTS, **options)


def test_what_cannot_be_shown_is_refused_before_training(run, tmp_path):
    (model, _), _, _ = run
    before = weights(model)
    for documents_, error in ((["ab", None], "None"), (["a"], "context_length")):
        with pytest.raises((TypeError, ValueError), match=error):
            model.fit(TEXTS, verbose=0, callbacks=[Completions(documents_)])
    sft = keras_ebft.EBFTModel.sft(model.causal_lm, seed=0)
    sft.compile("sgd")
    with pytest.raises(ValueError, match="learns from rollouts"):
        sft.fit(TEXTS, verbose=0, callbacks=[Completions(TEXTS)])
    plain = keras.Sequential([keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"EBFTModel.*Sequential"):
        plain.fit(np.ones((1, 1)), np.ones(1), callbacks=[Completions(TEXTS)])
    for one, other in zip(before, weights(model)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.on_torch
def test_models_without_texts_show_token_ids():
    x = documents(1, 12)
    blocks = build(llama(num_layers=1)).completions(x, seed=0)
    assert [block["anchor"] for block in blocks] == [4, 9]
    assert blocks[1]["prompt"] == x[0, :9].tolist()
    assert blocks[1]["truth"] == x[0, 9:12].tolist()
    rollout = blocks[1]["rollouts"][0]
    assert rollout["tokens"] == [str(token) for token in rollout["text"]]


@pytest.mark.on_torch
def test_what_ends_a_rollout_is_no_text():
    causal_lm = reader()
    end = causal_lm.preprocessor.tokenizer.end_token_id
    written = np.array([[[[7, end, 7], [7, 8, 9]], [[end, 7, 7], [7, 7, end]]]])
    model = keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.ReplaySampler(
            written, stride=5, context_length=4, stop_token_ids=(end,)
        ),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
    )
    first, second = model.completions(TEXTS[:1])
    assert [len(r["text"]) for r in first["rollouts"]] == [1, 0]
    assert [len(r["tokens"]) for r in first["rollouts"]] == [2, 1]
    assert [len(r["text"]) for r in second["rollouts"]] == [3, 2]
    assert [r["ended"] for r in first["rollouts"]] == [True, True]
    assert [r["ended"] for r in second["rollouts"]] == [False, True]


@pytest.mark.on_torch
def test_rewards_of_tokens_are_lists(capsys):
    model = keras_ebft.EBFTModel(
        reader(),
        keras_ebft.BlockSampler(3, 5, 4, num_samples=2),
        keras_ebft.FeatureNetwork(layers=(1,), pooling="token"),
        seed=0,
    )
    block = model.completions(TEXTS, seed=0)[0]
    rollouts = model.rollout(TEXTS, seed=0)
    expected = to_numpy(model.rewards(TEXTS, rollouts)["reward"])[0, 1, 0]
    np.testing.assert_allclose(block["rollouts"][1]["reward"], expected, rtol=1e-5)
    Completions(TEXTS).writers[0].write(0, 0, [block])
    assert f"{np.mean(expected):.3f}" in capsys.readouterr().out
