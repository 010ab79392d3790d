"""Whole steps against the authors' code, on its tiny checkpoints."""

import keras
import numpy as np
import pytest
from helpers import XLA, to_numpy
from keras import ops

import keras_ebft
from keras_ebft.backend.runtime import compiled
from keras_ebft.layout.documents import read_documents
from keras_ebft.training.batches import as_batch

XLA_ON_TENSORFLOW = (
    pytest.mark.slow,
    pytest.mark.compiled,
    pytest.mark.xla,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="XLA is a choice there"
    ),
)
POOLINGS = {"last_token": "last_token", "mean_pooling": "mean", "concat": "concat"}
MODES = {
    "concat": {"mode": "concat"},
    "stack": {"mode": "stack"},
    "layer_3": {"layers": (3,)},
    "last_only": {"mode": "last"},
    "mean": {"mode": "mean"},
    "middle": {"mode": "middle"},
}


@pytest.fixture(scope="module")
def every_layer(pipeline):
    """What the frozen network says after every layer, of documents and rollouts."""
    model = pipeline.model(feature_network=keras_ebft.FeatureNetwork(mode="mean"))
    step = model._step
    documents = read_documents(
        as_batch({"token_ids": ops.convert_to_tensor(pipeline.prompt)})
    )
    blocks = step.blocks(documents)
    rollouts = ops.convert_to_tensor(pipeline.generated)

    def taps(token_ids, rollouts):
        reader = model.feature_reader
        state = reader.read(documents._replace(token_ids=token_ids))
        continued = reader.continued(state, rollouts, blocks)
        return reader.taps(state.outputs), reader.taps(continued)

    run = compiled(taps, lambda: model.frozen_network.variables)
    return run(documents.token_ids, rollouts), blocks


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mode", MODES)
def test_features_and_rewards(pipeline, every_layer, mode, pooling):
    network = keras_ebft.FeatureNetwork(pooling=POOLINGS[pooling], **MODES[mode])
    (document, rollout), blocks = every_layer
    tapped = [index - 1 for index in network.tapped_layers(len(document))]
    everything = ops.ones(pipeline.generated.shape, dtype="bool")
    generated = network.generated([rollout[i] for i in tapped], everything, everything)
    target = network.target([document[i] for i in tapped], blocks)
    key = f"{mode}_{pooling}"
    expected = pipeline.values[f"features_{key}_generated"]
    assert generated.shape == expected.shape
    np.testing.assert_allclose(to_numpy(generated), expected, atol=1e-6)
    np.testing.assert_allclose(
        to_numpy(target), pipeline.values[f"features_{key}_target"], atol=1e-6
    )
    # Rollouts of these untrained networks have nearly parallel features, and whitening
    # amplifies rounding: the last bit of a feature moves a reward by 1.2e-5, whichever
    # code computes it. `test_functional` holds well-conditioned vectors to 1e-5.
    exact = pipeline.values, f"rewards_{key}"
    assert_rewards(expected, pipeline.values[f"features_{key}_target"], *exact)
    assert_rewards(generated, target, *exact)


def assert_rewards(generated, target, values, key, tolerance=5e-5):
    """Features of rollouts and of the truth have the rewards of the vectors."""
    reward = keras_ebft.FeatureMatchingReward()
    rewards = reward(ops.convert_to_tensor(generated), ops.convert_to_tensor(target))
    rewards["advantage"] = reward.advantages(rewards, "rloo")
    for name in ("alignment", "diversity", "reward", "advantage"):
        np.testing.assert_allclose(
            to_numpy(rewards[name]), values[f"{key}_{name}"], rtol=0, atol=tolerance
        )


def test_default_features_through_the_model(pipeline):
    """The network cut off above its last tap says what the whole one says."""
    generated, target = pipeline.default_model.features(
        pipeline.prompt, pipeline.generated
    )
    for found, name in ((generated, "generated"), (target, "target")):
        expected = pipeline.values[f"features_concat_last_token_{name}"]
        np.testing.assert_allclose(to_numpy(found), expected, atol=1e-6)


@pytest.mark.numbers
def test_log_probabilities(pipeline):
    scores = pipeline.default_model.score(pipeline.prompt, pipeline.generated)
    for ours, theirs in (
        ("log_prob", "logprob_generated"),
        ("document_log_prob", "logprob_prompt"),
    ):
        np.testing.assert_allclose(
            to_numpy(scores[ours]), pipeline.values[theirs], rtol=0, atol=1e-5
        )


def test_losses(pipeline):
    model = pipeline.default_model
    losses = {
        name: float(to_numpy(value))
        for name, value in model.loss_terms(pipeline.prompt, pipeline.generated).items()
    }
    assert losses["ce_loss"] == pytest.approx(
        float(pipeline.values["ce_loss"]), abs=1e-5
    )
    assert losses["policy_loss"] == pytest.approx(
        float(pipeline.values["policy_loss"]), abs=1e-6
    )
    assert losses["loss"] == pytest.approx(
        losses["policy_loss"] + 0.03 * losses["ce_loss"], abs=1e-6
    )


def checkpoint_layout(causal_lm, family):
    """Weights by their checkpoint's names, in its (PyTorch) layout."""
    backbone = causal_lm.backbone
    layers = backbone.transformer_layers
    kernel = {
        name: to_numpy(weight)
        for name, weight in {
            "query": layers[0]._self_attention_layer._query_dense.kernel,
            "key": layers[0]._self_attention_layer._key_dense.kernel,
            "value": layers[0]._self_attention_layer._value_dense.kernel,
            "last_value": layers[5]._self_attention_layer._value_dense.kernel,
            "down": layers[7]._feedforward_output_dense.kernel,
        }.items()
    }
    width = backbone.hidden_dim
    embeddings = to_numpy(backbone.token_embedding.embeddings)
    if family == "gpt2":
        joined = [kernel[n].reshape(width, -1) for n in ("query", "key", "value")]
        return {
            "transformer.wte.weight": embeddings,
            "transformer.h.0.attn.c_attn.weight": np.concatenate(joined, axis=1),
            "transformer.h.7.mlp.c_proj.weight": kernel["down"],
            "transformer.ln_f.weight": to_numpy(backbone.layer_norm.gamma),
        }
    return {
        "model.embed_tokens.weight": embeddings,
        "model.layers.0.self_attn.q_proj.weight": kernel["query"].reshape(width, -1).T,
        "model.layers.5.self_attn.v_proj.weight": kernel["last_value"]
        .reshape(width, -1)
        .T,
        "model.layers.7.mlp.down_proj.weight": kernel["down"].T,
        "model.norm.weight": to_numpy(backbone.layer_norm.scale),
        "lm_head.weight": to_numpy(backbone.token_embedding.reverse_embeddings).T,
    }


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("ce_weight", "key", "compilation"),
    [
        # The next holds this gradient too, and one more.
        pytest.param(0.0, "rl", {}, marks=pytest.mark.slow),
        (0.03, "rl_ce0.03", {}),
        pytest.param(0.03, "rl_ce0.03", XLA, marks=XLA_ON_TENSORFLOW, id="XLA"),
    ],
)
def test_one_fit_step_of_sgd_is_minus_the_gradient(
    pipeline, ce_weight, key, compilation
):
    causal_lm = pipeline.causal_lm
    weights = [w.copy() for w in causal_lm.get_weights()]
    before = checkpoint_layout(causal_lm, pipeline.family)
    model = pipeline.model(ce_weight=ce_weight)
    model.compile(keras.optimizers.SGD(1.0), **compilation)
    model.fit(
        pipeline.prompt, batch_size=len(pipeline.prompt), shuffle=False, verbose=0
    )
    after = checkpoint_layout(causal_lm, pipeline.family)
    changes = [
        np.sum((new.astype("float64") - old) ** 2)
        for new, old in zip(causal_lm.get_weights(), weights)
    ]
    causal_lm.set_weights(weights)

    norm = float(pipeline.values[f"gradnorm_{key}"])
    assert np.sqrt(np.sum(changes)) == pytest.approx(norm, rel=1e-4)
    names = [n for n in pipeline.values.files if n.startswith(f"grad_{key}:")]
    assert len(names) >= 4
    for name in names:
        gradient = pipeline.values[name]
        change = after[name.split(":")[1]] - before[name.split(":")[1]]
        assert np.linalg.norm(change + gradient) < 1e-4 * np.linalg.norm(gradient)
