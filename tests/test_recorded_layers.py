"""Decoder layers that are recorded and played say what they say op by op."""

import logging

import keras
import numpy as np
import pytest
from helpers import documents, family, flat, to_numpy
from keras import ops

import keras_ebft
from keras_ebft import kernels, networks
from keras_ebft.backend import recording
from keras_ebft.backend.runtime import no_gradient
from keras_ebft.networks import recorded_layers, routed_network

ON_TORCH = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Other backends compile what they run."
)
X = documents(2, 18)
SAMPLER = {"rollout_length": 3, "stride": 4, "context_length": 4, "num_samples": 2}
# Of every way in which attention is supplied.
FAMILIES = ("Llama", "GPT2", "OPT", "Mistral", "Qwen3", "GPTNeoX", "Phi3")


@pytest.fixture
def played(monkeypatch):
    """Layers are recorded at once; the list of how often one was played."""
    calls, play = [], recorded_layers.RecordedLayer.play

    def watched(recorded, *arguments):
        calls.append(recorded)
        return play(recorded, *arguments)

    monkeypatch.setattr(recorded_layers.RecordedLayer, "play", watched)
    monkeypatch.setattr(recorded_layers, "PLAIN_CALLS", 0)
    return calls


def build(causal_lm=None, **sampler):
    return keras_ebft.EBFTModel(
        causal_lm or family("Llama"),
        keras_ebft.BlockSampler(**{**SAMPLER, **sampler}),
        keras_ebft.FeatureNetwork(layers=(1,)),
        seed=0,
    )


def found_by(model, x=X):
    """Rollouts and features of documents, as arrays."""
    rollouts = model.rollout(x, seed=0)
    found = [*rollouts.values(), *model.features(x, rollouts)]
    return [to_numpy(value) for value in found if value is not None]


def plainly(model, monkeypatch, x=X):
    """The same, with every layer as it is."""
    with monkeypatch.context() as context:
        context.setattr(routed_network, "worth_recording", lambda *_: False)
        return found_by(model, x)


def assert_same(found, expected):
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@ON_TORCH
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_played_is_the_same(name, played, monkeypatch):
    model = build(family(name))
    expected = plainly(model, monkeypatch)
    assert not played
    assert_same(found_by(model), expected)
    # Two layers of the policy read documents, and two tokens of every block; then the
    # frozen network reads both.
    assert len(played) >= 2 + 2 * 2 + 2


@ON_TORCH
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_what_is_played_is_the_same_in_half_precision(dtype, played, monkeypatch):
    model = build(family("Llama", dtype=dtype))
    expected = plainly(model, monkeypatch)
    assert_same(found_by(model), expected)
    assert played


@ON_TORCH
def test_quantized_layers_and_adapters_are_the_same(played, monkeypatch):
    causal_lm = family("Llama")
    causal_lm.backbone.quantize("int8", filters="query")
    causal_lm.backbone.enable_lora(2)
    random = np.random.default_rng(0)
    for variable in causal_lm.trainable_variables:
        variable.assign(0.3 * random.normal(size=variable.shape))
    model = build(causal_lm)
    expected = plainly(model, monkeypatch)
    assert_same(found_by(model), expected)
    assert played


@ON_TORCH
def test_where_blocks_stand_is_decided_anew(played, monkeypatch):
    """Recorded on some documents in a row and anchors, played on others."""
    random = np.random.default_rng(0)
    model = build(anchors="random", num_anchors=3)
    for _ in range(3):
        lengths = random.integers(6, 12, 2)
        segments = np.stack([np.arange(18) >= length for length in lengths])
        x = {
            "token_ids": X,
            "segment_ids": segments.astype("int32"),
            "padding_mask": np.ones_like(X),
        }
        expected = plainly(model, monkeypatch, x)
        played.clear()
        assert_same(found_by(model, x), expected)
        assert played


@ON_TORCH
def test_weights_are_read_anew(played, monkeypatch):
    model = build()
    before = found_by(model)
    for variable in model.causal_lm.variables:
        variable.assign(1.5 * variable)
    expected = plainly(model, monkeypatch)
    played.clear()
    found = found_by(model)
    assert played
    assert_same(found, expected)
    assert not np.array_equal(found[0], before[0])


@ON_TORCH
def test_other_implementations_are_recorded_anew(played):
    model = build()
    found_by(model)
    kernels.set_implementation("projection", "reference")
    played.clear()
    with kernels.watch_choices() as choices:
        found_by(model)
    assert choices["projection"] == {"reference"}


@ON_TORCH
def test_training_is_the_same(played, monkeypatch):
    """Nothing is played that has a gradient, rematerialized or not."""
    weights = []
    for recorded in (True, False):
        model = build()
        model.compile(keras.optimizers.SGD(0.1))
        if not recorded:
            monkeypatch.setattr(routed_network, "worth_recording", lambda *_: False)
            played.clear()
        model.fit(np.concatenate([X, X[::-1]]), batch_size=2, verbose=0)
        assert bool(played) == recorded
        weights.append(flat(model.trainable_variables))
    assert np.array_equal(*weights)


@ON_TORCH
def test_layers_run_plainly_at_first(played, monkeypatch):
    monkeypatch.setattr(recorded_layers, "PLAIN_CALLS", 7)
    model = build()
    model.rollout(X, seed=0)
    # Two steps of two layers, then four more.
    assert not played
    model.rollout(X, seed=0)
    # The eighth, which is played once more to be compared.
    assert len(played) == 2
    model.rollout(X, seed=0)
    assert len(played) == 2 + 4


@ON_TORCH
def test_few_shapes_are_known_at_a_time(played, monkeypatch):
    monkeypatch.setattr(recorded_layers, "MOST_KNOWN", 3)
    network = networks.routed_backbone(family("Llama").backbone)
    for length in (10, 12, 14, 16, 10):
        tokens = ops.convert_to_tensor(documents(1, length))
        with no_gradient():
            network(tokens, tokens, lambda query, *_, **__: (query, None))
    assert len(network._recordings._known) == 3
    # Each of two layers, the first of them twice, for five shapes.
    assert len(played) == 5 * 3


@ON_TORCH
def test_what_returns_something_else_is_not_played(played, monkeypatch, caplog):
    def record(function, arguments):
        return recording.record(lambda *t: [x + 1 for x in function(*t)], arguments)

    monkeypatch.setattr(recorded_layers, "record", record)
    model = build()
    expected = plainly(model, monkeypatch)
    with caplog.at_level(logging.INFO, "keras_ebft"):
        assert_same(found_by(model), expected)
    # Each was played once, to be compared.
    assert len(played) == 4
    assert "LlamaTransformerDecoder" in caplog.text
    assert "returns something else" in caplog.text


@ON_TORCH
def test_layers_that_cannot_be_recorded_run(played, monkeypatch, caplog):
    def record(function, arguments):
        def reads_values(*tensors):
            return function(*tensors) if float(ops.sum(tensors[0])) >= 0 else []

        return recording.record(reads_values, arguments)

    monkeypatch.setattr(recorded_layers, "record", record)
    model = build()
    expected = plainly(model, monkeypatch)
    with caplog.at_level(logging.INFO, "keras_ebft"):
        assert_same(found_by(model), expected)
    assert not played
    assert "run unrecorded" in caplog.text


def in_stages(one, two):
    constant = ops.arange(3, dtype="float32") + 1.0
    shared = one * constant
    return [shared, shared + two, one - 1.0]


@ON_TORCH
def test_results_are_there_as_soon_as_they_can_be():
    import torch

    one, two = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    found = recording.record(in_stages, [[one], [two]])
    assert found.result_stages == [0, 1, 0]
    assert [v.tolist() for v in found.constants.values()] == [[1.0, 2.0, 3.0]]
    (shared, less), left = found.play(0, [one + 1], {})
    assert shared.tolist() == [2.0, 6.0, 12.0]
    assert less.tolist() == [1.0, 2.0, 3.0]
    ((added,), left) = found.play(1, [two], left)
    assert added.tolist() == [6.0, 11.0, 18.0]
    assert not left


@ON_TORCH
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [ops.cast(x, "float32").bernoulli()], "bernoulli"),
        (lambda x: [x.clone().add_(1.0)], "add_"),
        (lambda x: [x[x > 0]], "nonzero|index"),
        (lambda x: [x * float(x.sum())], "value"),
        (lambda x: [x + WEIGHT.value], "weight that is no argument"),
    ],
)
def test_what_does_not_follow_from_shapes_is_not_recorded(function, reason):
    x = ops.ones((3,))
    with pytest.raises(recording.NotRecordableError, match=reason):
        recording.record(function, [[x]])


WEIGHT = keras.Variable([1.0, 2.0, 3.0])


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch runs op by op.")
def test_nothing_is_recorded_elsewhere(played):
    found_by(build())
    assert not recording.runs_op_by_op()
    assert not played
