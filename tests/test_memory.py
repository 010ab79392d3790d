"""Settings that save memory: the same numbers, less kept for the backward pass."""

import functools
import itertools
import sys

import keras
import numpy as np
import pytest
from helpers import (
    VOCABULARY,
    XLA,
    documents,
    family,
    flat,
    gradients,
    llama,
    set_random_seed,
    to_numpy,
)

import keras_ebft
from keras_ebft.networks import adapters, prefix_cache

# RWKV-7 says that kernels of a package of its own would be faster.
pytestmark = pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package:UserWarning")

X = documents(2, 16)
ROLLOUTS = documents(2 * 4 * 2, 3, seed=4).reshape(2, 4, 2, 3)
SAMPLER = keras_ebft.BlockSampler(
    rollout_length=3, stride=5, context_length=4, num_samples=4
)
NETWORK = keras_ebft.FeatureNetwork(layers=(1,))
SETTINGS = {
    "rematerialize": {"rematerialize": True},
    "micro_batches": {"micro_batches": 2},
    "both": {"rematerialize": True, "micro_batches": 4},
}
# Of the largest gradient; float32 rounds to 1e-7 of it.
TOLERANCE = 5e-6


def build(causal_lm, **options):
    return keras_ebft.EBFTModel(causal_lm, SAMPLER, NETWORK, seed=0, **options)


def make(name, adapted=False, scope=None, mode=None, **changes):
    """A model of a family, the same whenever it is made."""
    set_random_seed(1)
    with keras.RematScope(mode=scope):
        causal_lm = family(name, **changes)
    if mode is not None:
        causal_lm.quantize(mode, filters=is_dense)
    if adapted:
        causal_lm.backbone.enable_lora(2)
        random = np.random.default_rng(5)
        layers = adapters.adapted_layers(causal_lm.backbone)
        for variable in adapters.adapter_variables(layers):
            variable.assign(0.3 * random.normal(size=variable.shape))
    return causal_lm


def gradient(causal_lm, **options):
    model = build(causal_lm, **options)

    def loss():
        scores = model.score(X, ROLLOUTS)
        rollouts = 0.7 * scores["log_prob"] + 0.1 * scores["entropy"]
        documents = keras.ops.mean(scores["document_log_prob"])
        return keras.ops.mean(rollouts) + documents

    return flat(gradients(loss, causal_lm.trainable_variables))


@functools.cache
def expected_gradient(name, adapted=False, **changes):
    return gradient(make(name, adapted, **changes))


# With everything at once; on PyTorch all families, where compiling takes its time a
# block with a window, and rows of their own.
QUICK_CASES = (("Llama", False, "both"),)
COMPILED_CASES = (
    ("Llama", True, "rematerialize"),
    ("Llama", True, "micro_batches"),
    ("Gemma3", True, "both"),
    ("RWKV7", False, "both"),
)


def marks(case):
    if case in QUICK_CASES:
        return []
    return [
        pytest.mark.slow,
        *([pytest.mark.compiled] if case in COMPILED_CASES else []),
    ]


NAMES = ("Llama", "GPT2", "Gemma3", "SmolLM3", "Mixtral", "Falcon", "GptOss", "RWKV7")
CASES = [
    pytest.param(*case, marks=marks(case))
    for case in itertools.product(NAMES, (False, True), SETTINGS)
    # Adapters find no layer of these by themselves.
    if not (case[1] and case[0] == "SmolLM3")
]


@pytest.mark.parametrize(("name", "adapted", "setting"), CASES)
def test_gradients_are_the_same(name, adapted, setting):
    expected = expected_gradient(name, adapted)
    scale = np.abs(expected).max()
    found = gradient(make(name, adapted), **SETTINGS[setting])
    np.testing.assert_allclose(found / scale, expected / scale, atol=TOLERANCE)


def test_the_tolerance_shows_a_weight_that_is_off():
    nudged = make("Llama")
    variable = nudged.trainable_variables[0]
    variable.assign(1.0001 * to_numpy(variable))
    expected = expected_gradient("Llama")
    difference = np.abs(gradient(nudged) - expected).max()
    assert difference / np.abs(expected).max() > 2 * TOLERANCE


@pytest.mark.slow
def test_gradients_are_the_same_for_packed_documents_and_anchors_of_their_own():
    """Anchors and documents' starts then are tensors, known in the step only."""
    x = {
        "token_ids": X,
        "segment_ids": np.repeat([[1, 2]], 8, axis=1).repeat(2, axis=0),
        "anchors": np.array([[3, 11], [5, -1]]),
    }
    found = []
    for options in ({}, SETTINGS["both"]):
        causal_lm = make("Llama")
        model = build(causal_lm, **options)

        def loss(model=model):
            return keras.ops.mean(model.score(x, ROLLOUTS)["log_prob"])

        found.append(flat(gradients(loss, causal_lm.trainable_variables)))
        rewards = model.rewards(x, ROLLOUTS)
        found.append(flat(to_numpy(value) for value in rewards.values()))
    for one, other in zip(found[:2], found[2:]):
        np.testing.assert_allclose(other, one, atol=1e-5)
        assert np.abs(one).max() > 0.05


@pytest.mark.slow
@pytest.mark.compiled
def test_a_feature_network_of_ones_own_and_stop_tokens_go_by_groups():
    table = np.random.default_rng(0).normal(size=(VOCABULARY, 8)).astype("float32")

    def network(token_ids, positions, attend):
        rows = keras.ops.take(keras.ops.convert_to_tensor(table), token_ids, axis=0)
        heads = rows[..., None, :]
        return attend(heads, heads, heads, scale=0.5)[..., 0, :]

    sampler = keras_ebft.BlockSampler(
        rollout_length=3,
        stride=5,
        context_length=4,
        num_samples=4,
        stop_token_ids=(3, 4, 5, 6),
    )
    features = keras_ebft.FeatureNetwork(network=network, pooling="mean")
    first, second = (
        keras_ebft.EBFTModel(make("Llama"), sampler, features, seed=0, **options)
        for options in ({}, SETTINGS["both"])
    )
    rollouts = first.rollout(X, seed=3)
    assert not to_numpy(rollouts["mask"]).all()
    for name, values in first.loss_terms(X, rollouts).items():
        found = float(to_numpy(second.loss_terms(X, rollouts)[name]))
        assert found == pytest.approx(float(to_numpy(values)), rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("setting", ["both"])
def test_gradients_are_the_same_in_half_precision(setting):
    expected = expected_gradient("Llama", dtype="mixed_bfloat16")
    found = gradient(make("Llama", dtype="mixed_bfloat16"), **SETTINGS[setting])
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.9999


def step_cases():
    for critic in (False, True):
        for setting in SETTINGS:
            # Where a backend compiles, once with everything.
            marks = [
                pytest.mark.slow
                if critic or setting != "both"
                else pytest.mark.on_torch
            ]
            if critic and setting == "both":
                marks.append(pytest.mark.compiled)
            yield pytest.param(setting, critic, marks=marks)


def make_critic():
    # Adam would make a step of full size of a gradient that is rounding alone.
    return keras_ebft.Critic(optimizer=keras.optimizers.SGD(0.5), train_features=True)


@pytest.mark.parametrize(("setting", "with_critic"), list(step_cases()))
def test_a_step_is_the_same(setting, with_critic):
    """Sampling, features, rewards and the reference as well."""
    found = []
    for changes in ({}, SETTINGS[setting]):
        critic = make_critic() if with_critic else None
        set_random_seed(1)
        model = build(
            make("Llama", num_layers=1),
            # Whitening would amplify what rounding differs in.
            reward=keras_ebft.FeatureMatchingReward(whitening=None),
            kl_weight=0.1,
            kl_estimator="k3",
            ce_weight=0.2,
            critic=critic,
            **changes,
        )
        start = flat(model.frozen_network.get_weights())
        before = flat(model.causal_lm.get_weights())
        set_random_seed(1)
        model.compile(keras.optimizers.SGD(0.5))
        history = model.fit(X, batch_size=2, verbose=0).history
        logs = np.array([history[name][0] for name in sorted(history)])
        found.append((logs, flat(model.causal_lm.get_weights()), model))
    (logs, weights, first), (other_logs, other_weights, second) = found
    np.testing.assert_allclose(other_logs, logs, rtol=2e-5, atol=1e-6)
    change = np.abs(weights - before).max()
    assert change > 1e-2
    np.testing.assert_allclose(other_weights, weights, rtol=0, atol=TOLERANCE * change)
    # With a critic the feature network learns, too.
    one, other = (flat(m.frozen_network.get_weights()) for m in (first, second))
    np.testing.assert_allclose(other, one, atol=2e-6)
    assert (one != start).any() == with_critic


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("mode", [None, "int8"])
def test_settings_hold_under_compilation(mode):
    """The gradient, as a step of size 1 takes it, with adapters and a quantized base.

    By XLA on JAX and TensorFlow.
    """

    def moved(**options):
        causal_lm = make("Llama", adapted=True, mode=mode, num_layers=1)
        model = build(causal_lm, ce_weight=0.1, **options)
        model.compile(keras.optimizers.SGD(1.0), **XLA)
        before = flat(causal_lm.get_weights())
        model.fit(X, batch_size=2, verbose=0)
        return flat(causal_lm.get_weights()) - before

    expected = moved()
    scale = np.abs(expected).max()
    assert scale > 1e-2
    found = moved(**SETTINGS["both"])
    np.testing.assert_allclose(found / scale, expected / scale, atol=2 * TOLERANCE)


def is_dense(layer):
    return isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


def test_layers_run_again_and_groups_run_apart(monkeypatch):
    """Neither setting is accepted and ignored."""
    made, shapes, callers = [], [], set()
    remat = keras.remat
    monkeypatch.setattr(keras, "remat", lambda f: made.append(f) or remat(f))
    attend = prefix_cache.strided_attention

    def recorded(query, *args, **options):
        shapes.append(tuple(query.shape[:4]))
        callers.add(sys._getframe(1).f_code.co_filename)
        return attend(query, *args, **options)

    monkeypatch.setattr(prefix_cache, "strided_attention", recorded)
    build(make("Llama")).score(X, ROLLOUTS)
    assert not made
    assert set(shapes) == {(2, 4, 2, 2)}
    shapes.clear()
    build(make("Llama"), rematerialize=True, micro_batches=2).score(X, ROLLOUTS)
    # Two layers of the document; those of blocks once per traced or run group.
    assert len(made) >= 4
    assert set(shapes) == {(2, 2, 2, 2)}
    # TensorFlow has not rewritten it on the way.
    assert callers == {prefix_cache.__file__}


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="other backends compute no gradient of what stop_gradient cuts off",
)
def test_sampling_and_features_keep_nothing():
    import torch

    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none)
    model = build(make("Llama"))
    with hooks:
        rollouts = model.rollout(X, seed=3)
        model.rewards(X, rollouts)
    assert not kept
    with hooks:
        model.score(X, rollouts)
    assert kept


def test_rollouts_are_the_same_with_groups():
    first, second = (
        build(make("Llama"), **options).rollout(X, seed=3)
        for options in ({}, {"micro_batches": 2})
    )
    for name, values in first.items():
        np.testing.assert_allclose(
            to_numpy(values).astype("float64"),
            to_numpy(second[name]).astype("float64"),
            atol=1e-5,
            err_msg=name,
        )
    given = keras_ebft.ReplaySampler(ROLLOUTS, stride=5, context_length=4)
    model = keras_ebft.EBFTModel(make("Llama"), given, NETWORK, micro_batches=2)
    np.testing.assert_array_equal(to_numpy(model.rollout(X)["token_ids"]), ROLLOUTS)


def test_other_numbers_of_rollouts_are_scored_in_as_many_groups_as_fit():
    model, plain = build(make("Llama"), micro_batches=4), build(make("Llama"))
    three = ROLLOUTS[:, :3]
    for name, values in plain.score(X, three).items():
        found = to_numpy(model.score(X, three)[name])
        np.testing.assert_allclose(found, to_numpy(values), atol=1e-5)


def test_a_model_built_within_a_remat_scope_runs_its_layers_again():
    causal_lm = make("Llama", scope="full")
    assert build(causal_lm).rematerialize
    assert not build(causal_lm, rematerialize=False).rematerialize
    assert not build(make("Llama")).rematerialize
    found = gradient(make("Llama", scope="full"))
    np.testing.assert_allclose(found, expected_gradient("Llama"), atol=TOLERANCE)
    # What Keras set stays set.
    layer = causal_lm.backbone.transformer_layers[0]
    assert layer._remat_mode.mode == "full"
    assert "call" not in vars(layer)


def test_settings_are_saved():
    model = build(make("Llama"), rematerialize=True, micro_batches=2)
    loaded = keras_ebft.EBFTModel.from_config(model.get_config())
    assert (loaded.rematerialize, loaded.micro_batches) == (True, 2)


def test_values_that_do_not_fit_are_refused():
    causal_lm = llama(num_layers=1)
    with pytest.raises(
        ValueError, match=r"micro_batches=3 with num_samples=4.*1, 2, 4"
    ):
        build(causal_lm, micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches=0"):
        build(causal_lm, micro_batches=0)
    with pytest.raises(TypeError, match="rematerialize='full'"):
        build(causal_lm, rematerialize="full")
    with pytest.raises(ValueError, match=r"mode='activations'.*rematerialize=True"):
        build(make("Llama", scope="activations"))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="others have no such order"
)
def test_quantized_kernels_are_read_when_their_inputs_are_there():
    import tensorflow as tf

    model = build(make("Llama", adapted=True, mode="int4"))

    def sampled(tokens):
        x = {"token_ids": tokens, "padding_mask": tokens >= 0}
        return model(x).scores.log_prob

    graph = tf.function(sampled).get_concrete_function(tf.constant(X)).graph
    reads = [
        operation
        for operation in graph.get_operations()
        if operation.type == "ReadVariableOp" and operation.outputs[0].dtype == tf.int8
    ]
    assert reads
    assert all(operation.control_inputs for operation in reads)
