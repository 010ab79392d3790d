"""What objects show of themselves."""

import keras
import numpy as np
import pytest
from helpers import documents, llama

import keras_ebft
from keras_ebft import data, evaluation

pytestmark = pytest.mark.on_torch


def length(model):
    return {"length": 1.0}


def score(prompts, completions, targets):
    return np.zeros(np.shape(completions))


def letters(texts):
    return [[ord(letter) for letter in text] for text in texts]


@pytest.fixture(scope="module")
def model():
    sampler = keras_ebft.BlockSampler(rollout_length=3, stride=4, context_length=4)
    network = keras_ebft.FeatureNetwork(layers=(1,))
    return keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=7)


def test_configured_objects_show_the_call_that_makes_them():
    sampler = keras_ebft.BlockSampler(rollout_length=4, anchors="answer_start")
    assert repr(sampler) == (
        "BlockSampler(rollout_length=4, stride=8, context_length=8, num_samples=4, "
        "temperature=0.6, top_p=1.0, top_k=None, anchors='answer_start', "
        "num_anchors=1, stop_token_ids='auto')"
    )
    geometry = keras_ebft.BlockGeometry(32)
    assert repr(eval(repr(geometry), vars(keras_ebft))) == repr(geometry)
    assert repr(keras_ebft.FeatureNetwork(layers=(1,))) == (
        "FeatureNetwork(layers=(1,), mode='concat', pooling='last_token', "
        "network=None, ema_decay=None)"
    )
    total = keras_ebft.RewardSum(
        [keras_ebft.FeatureMatchingReward(), keras_ebft.VerifierReward(score)]
    )
    assert repr(total) == (
        "RewardSum(rewards=[FeatureMatchingReward(alignment_weight=1.0, "
        "diversity_weight=1.0, whitening='rollout', normalize='auto'), "
        "VerifierReward(fn=score, decode=True)], weights=[1.0, 1.0])"
    )
    replay = keras_ebft.ReplaySampler(np.zeros((2, 4, 3, 5), int))
    assert "(token_ids=int32[2, 4, 3, 5], rollout_length=5, " in repr(replay)
    assert "(selection='first', optimizer=AdamW(" in repr(keras_ebft.Critic())


def test_models_and_what_measures_them_show_their_settings(model):
    text = repr(model)
    assert text.startswith("EBFTModel(causal_lm=<LlamaCausalLM ")
    for part in (repr(model.sampler), repr(model.reward), "ce_weight=0.0", "seed=7"):
        assert part in text
    shown = repr(evaluation.FeatureMatching(model, (2, 3), num_samples=5))
    assert shown == "FeatureMatching(rollout_lengths=(2, 3), num_samples=5, seed=0)"
    paired = evaluation.PairedFeatureMatching(model, documents(3, 12), num_samples=4)
    assert repr(paired) == "PairedFeatureMatching(num_samples=4, documents=3, seed=0)"
    audit = repr(evaluation.RewardAudit(model, layers=((1,),), resamples=10))
    assert repr(model.sampler) in audit
    assert "resamples=10" in audit


def test_data_show_where_they_are_from(tmp_path):
    (tmp_path / "a.md").write_text("ab")
    files = data.TextFiles(tmp_path, "*.md")
    assert "pattern='*.md', not_utf8='skip')" in repr(files)
    records = data.from_records([{"a": 1}] * 20, text="{a}")
    assert repr(records) == (
        "RecordSequence(records=[{'a': 1}, {'a': 1}, {'a': 1}, {'a': 1}, {'a': 1}, "
        "{'a': 1}, ...], templates=('{a}',))"
    )
    stream = data.pack(["ab", "cd"], letters, 4, strategy="in_order", shard=(0, 2))
    assert repr(stream) == (
        "PackedStream(documents=['ab', 'cd'], tokenizer=letters, length=4, "
        "strategy='in_order', long_documents='split', shard=(0, 2), window_rows=1024)"
    )
    assert "'token_ids': int32[1, 4]" in repr(stream.load())
    pytest.importorskip("jinja2")
    template = data.ChatTemplate("{{ messages }}", eos_token="</s>")
    assert repr(template) == (
        "ChatTemplate(template='{{ messages }}', eos_token='</s>')"
    )


def test_no_public_object_is_an_address(model, byte_lm):
    made = [
        model,
        keras_ebft.TrainingCheckpoint("run.weights.h5", save_freq=3),
        keras_ebft.callbacks.Measure(length, every=2),
        keras_ebft.CharacteristicFunctionReward(),
        keras_ebft.recipes.qa_code(),
        evaluation.Sandbox(cpu_seconds=3),
        evaluation.TextGenerator(byte_lm, max_length=9),
        data.PRESETS["alma"],
    ]
    settings = ("seed=7", "save_freq=3", "every=2", "num_frequencies=256", "0.03")
    settings += ("cpu_seconds=3", "max_length=9", "huggingface")
    for thing, setting in zip(made, settings, strict=True):
        assert setting in repr(thing)
        assert " object at 0x" not in repr(thing)
        assert "<function" not in repr(thing)


def test_every_public_class_shows_its_settings():
    for module in (keras_ebft, data, evaluation, keras_ebft.callbacks):
        for name in module.__all__:
            kind = getattr(module, name)
            if isinstance(kind, type):
                plain = (object.__repr__, keras.Model.__repr__)
                assert kind.__repr__ not in plain, name
