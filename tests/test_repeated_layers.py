"""Like decoder layers in a loop say what they say one after another."""

import keras
import numpy as np
import pytest
from helpers import documents, family, flat, to_numpy, value_and_gradients

import keras_ebft
from keras_ebft.networks import family_of, repeated_layers

X = documents(2, 18)
SAMPLER = {"rollout_length": 3, "stride": 4, "context_length": 4, "num_samples": 2}


@pytest.fixture
def looped(monkeypatch):
    """Layers run in loops, and the list of how many each loop ran."""
    return watch_loops(monkeypatch)


@pytest.fixture
def looped_op_by_op(monkeypatch):
    """The same outside of `fit`."""
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow loops in its graphs alone: `compiles_every_step`")
    counts = watch_loops(monkeypatch)
    monkeypatch.setattr(repeated_layers, "compiles_every_step", lambda: True)
    return counts


def watch_loops(monkeypatch):
    counts, loop = [], repeated_layers.loop

    def watched(step, carry, inputs):
        counts.append(len(inputs))
        return loop(step, carry, inputs)

    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 4)
    monkeypatch.setattr(repeated_layers, "loop", watched)
    return counts


CASES = {
    "Llama": {},
    "GPT2": {},
    "adapters": {},
    "rematerialize": {"rematerialize": True},
}
QUICK = ("adapters",)


def build(case, dtype="float32", feature_network=None, **options):
    name = case if case in ("Llama", "GPT2") else "Llama"
    causal_lm = family(name, num_layers=5, dtype=dtype)
    if case == "adapters":
        causal_lm.backbone.enable_lora(2)
        random = np.random.default_rng(0)
        for variable in causal_lm.trainable_variables:
            variable.assign(0.1 * random.normal(size=variable.shape))
    return keras_ebft.EBFTModel(
        causal_lm,
        keras_ebft.BlockSampler(**SAMPLER),
        feature_network or keras_ebft.FeatureNetwork(layers=(4,)),
        seed=0,
        **{"ce_weight": 0.3, "kl_weight": 0.1, **options},
    )


def loss_and_gradients(case, **options):
    model = build(case, **CASES[case], **options)
    rollouts = documents(16, 3, seed=2).reshape(2, 2, 4, 3)[:, :, :4]
    rollouts = np.resize(rollouts, (2, 2, 3, 3))
    return value_and_gradients(
        lambda: model.loss_terms(X, rollouts)["loss"], model.trainable_variables
    )


@pytest.mark.parametrize(
    "case",
    [
        c
        if c in QUICK
        else pytest.param(c, marks=[pytest.mark.slow, pytest.mark.compiled])
        for c in CASES
    ],
)
def test_loss_and_gradients_are_the_same(looped_op_by_op, monkeypatch, case):
    value, gradients = loss_and_gradients(case)
    # The policy's five layers, and those of the frozen network up to its tap; the one
    # above, which the reference needs, is no loop.
    assert set(looped_op_by_op) == {5, 4}
    looped_op_by_op.clear()
    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 99)
    expected, expected_gradients = loss_and_gradients(case)
    assert not looped_op_by_op
    assert float(to_numpy(value)) == pytest.approx(float(to_numpy(expected)), rel=2e-5)
    found, wanted = flat(gradients), flat(expected_gradients)
    assert np.linalg.norm(wanted) > 1e-3
    assert np.linalg.norm(found - wanted) < 2e-5 * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.compiled
def test_half_precision_rounds_no_worse_in_a_loop(looped_op_by_op, monkeypatch):
    # Rewards would amplify what half precision rounds.
    options = {"policy_weight": 0.0, "kl_weight": 0.0}
    half = {**options, "dtype": "mixed_bfloat16"}
    gradients = [flat(loss_and_gradients("Llama", **half)[1])]
    assert set(looped_op_by_op) == {5}
    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 99)
    gradients.append(flat(loss_and_gradients("Llama", **half)[1]))
    exact = flat(loss_and_gradients("Llama", **options)[1])
    in_loop, one_by_one = (np.linalg.norm(g - exact) for g in gradients)
    assert one_by_one < 0.2 * np.linalg.norm(exact)
    assert in_loop < 1.5 * one_by_one


def test_layers_that_differ_are_no_loop(looped_op_by_op):
    causal_lm = family("Llama", num_layers=5)
    layer = causal_lm.backbone.transformer_layers[4]
    layer._self_attention_layer._query_dense.enable_lora(2)
    for variable in causal_lm.backbone.trainable_variables:
        variable.trainable = "lora" in variable.path
    network = keras_ebft.FeatureNetwork(layers=(4,))
    model = keras_ebft.EBFTModel(causal_lm, keras_ebft.BlockSampler(**SAMPLER), network)
    before = [to_numpy(v) for v in model.causal_lm.variables]
    model.rollout(X, seed=0)
    assert not looped_op_by_op
    assert all(np.array_equal(a, b) for a, b in zip(before, model.causal_lm.variables))


def test_sampling_in_a_loop_draws_the_same(looped_op_by_op, monkeypatch):
    model = build("Llama")
    rollouts = model.rollout(X, seed=0)
    # Documents are read, and tokens sampled, in loops over the layers.
    assert set(looped_op_by_op) == {5}
    assert len(looped_op_by_op) > 1
    looped_op_by_op.clear()
    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 99)
    expected = build("Llama").rollout(X, seed=0)
    assert not looped_op_by_op
    for name in ("token_ids", "anchors"):
        assert np.array_equal(to_numpy(rollouts[name]), to_numpy(expected[name]))


def test_layers_between_taps_are_loops(looped_op_by_op, monkeypatch):
    monkeypatch.setattr(repeated_layers, "FEWEST_IN_A_LOOP", 2)
    model = build("Llama", feature_network=keras_ebft.FeatureNetwork(layers=(2, 4, 5)))
    rollouts = model.rollout(X, seed=0)
    looped_op_by_op.clear()
    features = model.features(X, rollouts)
    # Two layers up to each of the first two taps; the third tap is one layer on.
    assert set(looped_op_by_op) == {2}
    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 99)
    model = build("Llama", feature_network=keras_ebft.FeatureNetwork(layers=(2, 4, 5)))
    for found, expected in zip(features, model.features(X, rollouts)):
        assert np.allclose(to_numpy(found), to_numpy(expected), atol=1e-5)


def fitted_weights(case, **compile_options):
    model = build(case, **CASES[case])
    model.compile(keras.optimizers.SGD(0.1), **compile_options)
    model.fit(X, batch_size=2, verbose=0)
    return flat(model.trainable_variables)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param("adapters", {}, marks=[pytest.mark.slow, pytest.mark.compiled]),
        pytest.param(
            "rematerialize",
            {"jit_compile": True},
            marks=[pytest.mark.slow, pytest.mark.slow_compiled],
        ),
    ],
)
def test_training_in_graphs_is_the_same(looped, monkeypatch, case, options):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("elsewhere loops are the same inside of `fit` and outside")
    before = flat(build(case).trainable_variables)
    weights = fitted_weights(case, **options)
    assert set(looped) == {5, 4}
    looped.clear()
    monkeypatch.setattr(repeated_layers, "FEWEST_LAYERS", 99)
    expected = fitted_weights(case, **options)
    assert not looped
    moved = np.linalg.norm(expected - before)
    assert moved > 1e-3
    assert np.linalg.norm(weights - expected) < 1e-4 * moved


def test_where_a_loop_pays():
    alike = keras.backend.backend() == "jax"
    backbone = family("Llama", num_layers=12).backbone
    layers, given = backbone.transformer_layers, [None] * 12
    record = family_of(backbone)
    worth_looping = repeated_layers.worth_looping
    assert worth_looping(record, layers, given, 12) is alike
    # Layers up to a tap of a network that is deep enough, or is not.
    assert worth_looping(record, layers[:4], given[:4], 12) is alike
    assert not worth_looping(record, layers[:3], given[:3], 12)
    assert not worth_looping(record, layers[:11], given[:11], 11)
    assert not worth_looping(record, layers, [None, *[[]] * 11], 12)
