"""Bad input: what was expected, what was received, how to mend it."""

import inspect

import keras
import numpy as np
import pytest
from helpers import documents, family, llama

import keras_ebft
from keras_ebft.training.fit_data import split_rows, token_batches
from keras_ebft.training.token_rows import to_token_rows

TOKENS = np.zeros((1, 2, 3, 4), dtype="int32")

# (constructor, arguments, error, what the message must say)
CONSTRUCTORS = [
    (keras_ebft.BlockGeometry, {"length": 3}, ValueError, "8 \\+ 8 = 16.*length=3"),
    (keras_ebft.BlockGeometry, {"length": 9.5}, TypeError, "length=9.5"),
    (keras_ebft.BlockGeometry, {"length": 40, "stride": 0}, ValueError, "stride=0"),
    (
        keras_ebft.BlockGeometry,
        {"length": 40, "context_length": 0},
        ValueError,
        "context_length=0",
    ),
    (
        keras_ebft.BlockGeometry,
        {"length": 40, "rollout_length": -1},
        ValueError,
        "rollout_length=-1",
    ),
    (keras_ebft.BlockSampler, {"rollout_length": 0}, ValueError, "rollout_length=0"),
    (keras_ebft.BlockSampler, {"rollout_length": 2.0}, TypeError, "2.0.*float"),
    (keras_ebft.BlockSampler, {"stride": 0}, ValueError, "stride=0"),
    (keras_ebft.BlockSampler, {"context_length": 0}, ValueError, "at least 1"),
    (keras_ebft.BlockSampler, {"num_samples": 0}, ValueError, "num_samples=0"),
    (keras_ebft.BlockSampler, {"num_samples": True}, TypeError, "bool"),
    (keras_ebft.BlockSampler, {"temperature": -0.5}, ValueError, "at least 0"),
    (keras_ebft.BlockSampler, {"temperature": float("nan")}, ValueError, "finite"),
    (keras_ebft.BlockSampler, {"temperature": 1e-40}, ValueError, "0 or at least"),
    (keras_ebft.BlockSampler, {"temperature": 1e30}, ValueError, "at most 10000"),
    (keras_ebft.BlockSampler, {"stride": 2**64}, ValueError, "at most 2147483647"),
    (keras_ebft.BlockSampler, {"stride": np.ones(2)}, TypeError, "stride=array"),
    (keras_ebft.BlockSampler, {"anchors": np.ones(2)}, ValueError, "anchors=array"),
    (keras_ebft.BlockSampler, {"anchors": ["stride"]}, ValueError, "anchors=.'stride'"),
    (
        keras_ebft.BlockSampler,
        {"stop_token_ids": np.ones(2, int)},
        TypeError,
        "stop_token_ids=array",
    ),
    (
        keras_ebft.BlockSampler,
        {"stop_token_ids": (2**70,)},
        ValueError,
        "at most 2147483647",
    ),
    (keras_ebft.FeatureNetwork, {"layers": np.array([1, 2])}, ValueError, "array"),
    (keras_ebft.FeatureNetwork, {"mode": np.array(["last"])}, ValueError, "mode=array"),
    (keras_ebft.FeatureNetwork, {"layers": (2**70,)}, ValueError, "at most 2147483647"),
    (keras_ebft.FeatureNetwork, {"pooling": None}, ValueError, "pooling=None"),
    (
        keras_ebft.FeatureMatchingReward,
        {"alignment_weight": 1e308},
        ValueError,
        "at most 1000000",
    ),
    (
        keras_ebft.FeatureMatchingReward,
        {"diversity_weight": 10**400},
        ValueError,
        "at most 1000000",
    ),
    (
        keras_ebft.FeatureMatchingReward,
        {"whitening": np.array(["rollout", "feature"])},
        ValueError,
        "whitening=array",
    ),
    (
        keras_ebft.CharacteristicFunctionReward,
        {"bandwidth": 1e-40},
        ValueError,
        "at least 1e-06",
    ),
    (keras_ebft.CharacteristicFunctionReward, {"seed": 2**31}, ValueError, "at most"),
    (keras_ebft.Critic, {"optimizer": {}}, TypeError, r"optimizer=\{\}.*AdamW"),
    (keras_ebft.Critic, {"optimizer": "best"}, ValueError, "'best'.*adamw"),
    (keras_ebft.Critic, {"optimizer": 3}, TypeError, "optimizer=3"),
    (keras_ebft.Critic, {"selection": np.ones(3)}, ValueError, "selection=array"),
    (
        keras_ebft.RewardSum,
        {"rewards": [keras_ebft.FeatureMatchingReward()], "weights": 0.5},
        TypeError,
        "weights=0.5.*example",
    ),
    (
        keras_ebft.RewardSum,
        {"rewards": [keras_ebft.FeatureMatchingReward()], "weights": [1e300]},
        ValueError,
        "at most 1000000",
    ),
    (keras_ebft.BlockSampler, {"temperature": "hot"}, TypeError, "'hot'.*str"),
    (keras_ebft.ReplaySampler, {"token_ids": TOKENS + 0.5}, TypeError, "float64"),
    (keras_ebft.ReplaySampler, {"token_ids": TOKENS[0]}, ValueError, "\\(2, 3, 4\\)"),
    (keras_ebft.ReplaySampler, {"token_ids": TOKENS - 9}, ValueError, "to -9"),
    (
        keras_ebft.ReplaySampler,
        {"token_ids": TOKENS.astype("int64") + 2**32 + 1},
        ValueError,
        "0 to 2147483647.*4294967297",
    ),
    (keras_ebft.ReplaySampler, {"token_ids": [[1, 2], [3]]}, ValueError, "unequal"),
    (
        keras_ebft.ReplaySampler,
        {"token_ids": TOKENS, "num_samples": 3},
        ValueError,
        "2 and 4.*3 and 4",
    ),
    (keras_ebft.FeatureNetwork, {"layers": ()}, ValueError, "non-empty"),
    (keras_ebft.FeatureNetwork, {"layers": 3}, ValueError, "layers=3"),
    (keras_ebft.FeatureNetwork, {"layers": (0,)}, ValueError, "at least 1"),
    (keras_ebft.FeatureNetwork, {"layers": (1.5,)}, ValueError, "\\(0, 1\\].*1.5"),
    (keras_ebft.FeatureNetwork, {"layers": ("last",)}, TypeError, "'last'"),
    (keras_ebft.FeatureNetwork, {"mode": "sum"}, ValueError, "concat.*'sum'"),
    (keras_ebft.FeatureNetwork, {"pooling": "max"}, ValueError, "last_token.*'max'"),
    (
        keras_ebft.FeatureMatchingReward,
        {"alignment_weight": -1.0},
        ValueError,
        "alignment_weight=-1",
    ),
    (
        keras_ebft.FeatureMatchingReward,
        {"diversity_weight": None},
        TypeError,
        "diversity_weight=None",
    ),
    (
        keras_ebft.FeatureMatchingReward,
        {"alignment_weight": 0, "diversity_weight": 0.0},
        ValueError,
        "nothing is trained",
    ),
    (keras_ebft.FeatureMatchingReward, {"whitening": "pca"}, ValueError, "'pca'"),
    (keras_ebft.FeatureMatchingReward, {"normalize": "l1"}, ValueError, "'l1'"),
    (keras_ebft.BlockSampler, {"top_p": 0.0}, ValueError, "greater than 0"),
    (keras_ebft.BlockSampler, {"top_p": 1.5}, ValueError, "at most 1"),
    (keras_ebft.BlockSampler, {"top_k": 0}, ValueError, "top_k=0"),
    (keras_ebft.BlockSampler, {"anchors": "end"}, ValueError, "answer_start.*'end'"),
    (keras_ebft.BlockSampler, {"anchors": "random"}, ValueError, "num_anchors=32"),
    (keras_ebft.BlockSampler, {"num_anchors": 3}, ValueError, "num_anchors=3"),
    (
        keras_ebft.BlockSampler,
        {"anchors": "random", "num_anchors": 0},
        ValueError,
        "num_anchors=0",
    ),
    (keras_ebft.BlockSampler, {"stop_token_ids": 3}, TypeError, "auto.*int"),
    (keras_ebft.BlockSampler, {"stop_token_ids": (-1,)}, ValueError, "=-1"),
    (
        keras_ebft.FeatureNetwork,
        {"mode": "last", "layers": (1,)},
        ValueError,
        "no `layers` with mode='last'",
    ),
    (keras_ebft.FeatureNetwork, {"network": "bert"}, TypeError, "callable.*'bert'"),
    (keras_ebft.FeatureNetwork, {"ema_decay": 1.0}, ValueError, "ema_decay=1.0"),
    (
        keras_ebft.FeatureNetwork,
        {"network": max, "ema_decay": 0.9},
        ValueError,
        "no policy to follow",
    ),
    (keras_ebft.FeatureNetwork, {"network": max, "mode": "stack"}, ValueError, "stack"),
    (
        keras_ebft.CharacteristicFunctionReward,
        {"num_frequencies": 0},
        ValueError,
        "num_frequencies=0",
    ),
    (
        keras_ebft.CharacteristicFunctionReward,
        {"bandwidth": 0.0},
        ValueError,
        "bandwidth=0.0",
    ),
    (keras_ebft.CharacteristicFunctionReward, {"seed": -1}, ValueError, "seed=-1"),
    (
        keras_ebft.CharacteristicFunctionReward,
        {"whitening": "x", "alignment_weight": 1.0, "diversity_weight": 1.0},
        ValueError,
        "'x'",
    ),
    (
        keras_ebft.CharacteristicFunctionReward,
        {"normalize": "l1"},
        ValueError,
        "'l1'",
    ),
    (keras_ebft.Critic, {"selection": "last"}, ValueError, "closest.*'last'"),
    (keras_ebft.Critic, {"train_features": 1}, TypeError, "train_features=1"),
    (keras_ebft.Critic, {"optimizer": "warp"}, ValueError, "warp"),
    (keras_ebft.VerifierReward, {"fn": "f"}, TypeError, "prompts.*'f'"),
    (keras_ebft.VerifierReward, {"fn": max, "decode": 1}, TypeError, "decode=1"),
    (keras_ebft.RewardSum, {"rewards": []}, ValueError, "non-empty"),
    (keras_ebft.RewardSum, {"rewards": ["x"]}, TypeError, "Reward.*'x'"),
    (
        keras_ebft.RewardSum,
        {"rewards": [keras_ebft.FeatureMatchingReward()], "weights": [1.0, 2.0]},
        ValueError,
        "2 weights",
    ),
    (
        keras_ebft.RewardSum,
        {"rewards": [keras_ebft.FeatureMatchingReward()], "weights": [0.0]},
        ValueError,
        "nothing is trained",
    ),
]

ONE_SAMPLE = keras_ebft.BlockSampler(num_samples=1)
TOKENS_APART = keras_ebft.FeatureNetwork(pooling="token")

MODEL_OPTIONS = [
    ({"sampler": {"rollout_length": 8}}, TypeError, "BlockSampler.*dict"),
    (
        {"sampler": keras_ebft.ReplaySampler(TOKENS + 31)},
        ValueError,
        "0 to 30.*31 to 31",
    ),
    (
        {"sampler": keras_ebft.BlockSampler(stop_token_ids=(30, 31))},
        ValueError,
        "stop_token_ids.*0 to 30.*31",
    ),
    ({"feature_network": (0.5,)}, TypeError, "FeatureNetwork.*tuple"),
    ({"reward": "feature"}, TypeError, "Reward.*str.*FeatureMatchingReward"),
    ({"advantage": "gae"}, ValueError, "rloo.*'gae'"),
    ({"policy_weight": -1}, ValueError, "policy_weight=-1"),
    ({"ce_weight": "big"}, TypeError, "ce_weight='big'"),
    ({"policy_weight": 0.0, "ce_weight": 0.0}, ValueError, "nothing is trained"),
    ({"rematerialize": "full"}, TypeError, "rematerialize.*'full'"),
    ({"micro_batches": 0}, ValueError, "micro_batches=0"),
    ({"micro_batches": 3}, ValueError, "micro_batches=3"),
    ({"seed": -3}, ValueError, "seed=-3"),
    ({"seed": 1.5}, TypeError, "seed=1.5"),
    ({"seed": 2**31}, ValueError, r"at most 2147483645\..*seed=2147483648"),
    ({"seed": np.arange(2)}, TypeError, "seed=array"),
    ({"ce_weight": 1e308}, ValueError, "at most 1000000"),
    ({"advantage": np.array(["rloo", "rloo"])}, ValueError, "advantage=array"),
    ({"kl_estimator": np.array([1, 2])}, ValueError, "kl_estimator=array"),
    ({"micro_batches": 2**65}, ValueError, "at most"),
    ({"sampler": ONE_SAMPLE}, ValueError, "'rloo'.*num_samples=1"),
    (
        {"advantage": "group_norm", "sampler": ONE_SAMPLE},
        ValueError,
        "'group_norm'.*num_samples=1",
    ),
    (
        {"advantage": "reinforce", "sampler": ONE_SAMPLE},
        ValueError,
        "num_samples=1 and diversity_weight=1.0",
    ),
    (
        {"feature_network": TOKENS_APART, "policy_loss": "sequence"},
        ValueError,
        'pooling="token"',
    ),
    ({"policy_loss": "ppo"}, ValueError, "token.*'ppo'"),
    ({"kl_weight": -0.1}, ValueError, "kl_weight=-0.1"),
    ({"kl_estimator": "k0"}, ValueError, "k1.*'k0'"),
    ({"entropy_weight": "high"}, TypeError, "entropy_weight='high'"),
    ({"updates_per_rollout": 0}, ValueError, "updates_per_rollout=0"),
    ({"critic": "closest"}, TypeError, "Critic.*'closest'"),
    (
        {"critic": keras_ebft.Critic(), "policy_weight": 0.0, "ce_weight": 1.0},
        ValueError,
        "Leave the critic out",
    ),
    (
        {
            "critic": keras_ebft.Critic(train_features=True),
            "feature_network": keras_ebft.FeatureNetwork(ema_decay=0.9),
        },
        ValueError,
        "train_features=True",
    ),
    (
        {
            "critic": keras_ebft.Critic(),
            "feature_network": keras_ebft.FeatureNetwork(network=max),
        },
        ValueError,
        "whose width is known",
    ),
    ({"clip_range": 0.2}, ValueError, "updates_per_rollout=1"),
    ({"updates_per_rollout": 2, "clip_range": (1, 2, 3)}, ValueError, "low, high"),
    ({"updates_per_rollout": 2, "clip_range": 1.5}, ValueError, "at most 1"),
    ({"reward": keras_ebft.VerifierReward(max)}, ValueError, "decode=False"),
    (
        {
            "reward": keras_ebft.VerifierReward(max, decode=False),
            "feature_network": keras_ebft.FeatureNetwork(ema_decay=0.9),
        },
        ValueError,
        "looks at no features",
    ),
    (
        {"sampler": keras_ebft.BlockSampler(anchors="answer_start")},
        ValueError,
        "stop_token_ids",
    ),
    (
        {"feature_network": keras_ebft.FeatureNetwork(layers=(9,))},
        ValueError,
        "1 layers.*layer 9",
    ),
]

DOCUMENTS = [
    (np.zeros((2, 40)), TypeError, "float64"),
    (np.zeros(40, dtype="int32"), ValueError, "\\(40,\\)"),
    (np.zeros((2, 40, 1), dtype="int32"), ValueError, "\\(2, 40, 1\\)"),
    (np.full((2, 40), 31), ValueError, "0 to 30.*31 to 31"),
    (np.full((2, 40), -1), ValueError, "-1 to -1"),
    ({"tokens": documents(2, 40)}, ValueError, "'tokens'"),
    (
        {
            "token_ids": documents(2, 40),
            "padding_mask": np.ones((2, 40)),
            "segment_ids": documents(2, 39),
        },
        ValueError,
        "segment_ids.*Received: \\(2, 39\\)",
    ),
    (
        {"token_ids": documents(2, 40), "padding_mask": np.ones((2, 39))},
        ValueError,
        "\\(2, 40\\).*\\(2, 39\\)",
    ),
    (
        {"token_ids": documents(2, 40), "padding_mask": np.eye(2, 40)},
        ValueError,
        "right",
    ),
    (
        {"token_ids": documents(2, 40), "answer_mask": np.full((2, 40), 3)},
        ValueError,
        r"answer_mask.*\[3\]",
    ),
    (
        {"token_ids": documents(2, 40), "segment_ids": np.zeros((2, 40))},
        TypeError,
        "segment_ids.*float64",
    ),
    (
        {"token_ids": documents(2, 40), "anchors": np.zeros((2, 3))},
        TypeError,
        "anchors.*float64",
    ),
    (
        {"token_ids": documents(2, 40), "anchors": np.full((2, 3), 40)},
        ValueError,
        "1 to 39.*Received: 40",
    ),
    (
        {"token_ids": documents(2, 40), "anchors": np.full((1, 3), 9)},
        ValueError,
        "\\[2, K\\].*\\[1, 3\\]",
    ),
    (documents(2, 15), ValueError, "8 \\+ 8 = 16.*length=15"),
    (documents(0, 40), ValueError, "at least one document"),
    (["some text"], ValueError, "preprocessor"),
    (iter(()), ValueError, "at least one batch"),
]


@pytest.fixture(scope="module")
def model():
    model = keras_ebft.EBFTModel(llama(num_layers=1), seed=0)
    model.compile()
    return model


@pytest.mark.parametrize(("part", "arguments", "error", "message"), CONSTRUCTORS)
def test_constructors(part, arguments, error, message):
    with pytest.raises(error, match=message):
        part(**arguments)


@pytest.mark.parametrize(("options", "error", "message"), MODEL_OPTIONS)
def test_model_options(options, error, message):
    with pytest.raises(error, match=message):
        keras_ebft.EBFTModel(llama(num_layers=1), **options)


@pytest.mark.parametrize("causal_lm", [None, "gemma3_1b", keras.Sequential()])
def test_not_a_causal_lm(causal_lm):
    with pytest.raises(TypeError, match=r"keras_hub\.models\.CausalLM"):
        keras_ebft.EBFTModel(causal_lm)


def test_every_constructor_argument_is_in_a_table():
    for part in {entry[0] for entry in CONSTRUCTORS}:
        tested = {
            name for entry in CONSTRUCTORS if entry[0] is part for name in entry[1]
        }
        expected = set(inspect.signature(part).parameters) - {"geometry"}
        assert expected <= tested, part
    tested = {name for entry in MODEL_OPTIONS for name in entry[0]}
    expected = set(inspect.signature(keras_ebft.EBFTModel).parameters)
    assert expected - {"causal_lm", "kwargs"} <= tested


@pytest.mark.parametrize(("x", "error", "message"), DOCUMENTS)
def test_documents(model, x, error, message):
    with pytest.raises(error, match=message):
        model.fit(x, verbose=0)


def test_learned_positions_bound_the_length():
    causal_lm = family("GPT2")
    with pytest.raises(ValueError, match=r"at most 40 tokens.*41 tokens"):
        to_token_rows(documents(1, 41), causal_lm)


@pytest.mark.parametrize("name", ["y", "sample_weight", "class_weight"])
def test_targets_are_refused(model, name):
    x = documents(2, 40)
    with pytest.raises(ValueError, match=f"Received: {name}"):
        model.fit(x, **{name: np.ones(2)})
    with pytest.raises(ValueError, match="tuple of 2 parts"):
        model.fit(batch for batch in [(x, x)])


def test_compile_refuses_losses(model):
    with pytest.raises(ValueError, match="Received: loss, metrics"):
        model.compile("adam", loss="mse", metrics=["accuracy"])


def test_stream_errors(model):
    rows = documents(4, 40)
    with pytest.raises(ValueError, match="batch_size=2"):
        model.fit(iter([rows]), batch_size=2)
    with pytest.raises(ValueError, match="in memory"):
        split_rows(iter([rows]), model._reader, 0.5)
    with pytest.raises(ValueError, match="both sides"):
        split_rows(rows[:1], model._reader, 0.5)
    growing = (rows[:, :length] for length in (30, 40))
    with pytest.raises(ValueError, match=r"\[4, 30\].*\[4, 40\]"):
        batches = token_batches(growing, model._reader, None, False, 0)
        list(batches.get_numpy_iterator())


def test_rollouts_must_fit_the_documents(model):
    with pytest.raises(ValueError, match=r"\[2, n, 4, 8\].*\(2, 4, 3, 8\)"):
        model.score(documents(2, 40), np.zeros((2, 4, 3, 8), dtype="int32"))


IDS = np.zeros((2, 4, 4, 8), "int64")
PLACES = np.full((2, 4), 8)
GIVEN = {
    "below 0": (IDS - 1, ValueError, "0 to 30.*-1 to -1"),
    "beyond": (IDS + 31, ValueError, "0 to 30.*31 to 31"),
    "floats": (IDS + 0.5, TypeError, "token_ids.*float64"),
    "what int32 wraps": (IDS + 2**32 + 1, ValueError, "0 to 30.*4294967297"),
    "truths": (IDS == 0, TypeError, "token_ids.*bool"),
    "no ids": ({"anchors": PLACES}, ValueError, "'token_ids'.*anchors"),
    "half anchors": (
        {"token_ids": IDS, "anchors": PLACES + 0.5},
        TypeError,
        "anchors.*float64",
    ),
    "anchors beyond": (
        {"token_ids": IDS, "anchors": PLACES + 32},
        ValueError,
        "1 to 39.*40",
    ),
    "anchors of others": (
        {"token_ids": IDS, "anchors": PLACES[:1]},
        ValueError,
        r"\[2, K\].*\[1, 4\]",
    ),
}


@pytest.mark.parametrize("way", ["score", "features", "rewards", "loss_terms"])
@pytest.mark.parametrize("kind", GIVEN)
def test_rollouts_are_used_as_given_or_refused(model, way, kind):
    rollouts, error, message = GIVEN[kind]
    with pytest.raises(error, match=message):
        getattr(model, way)(documents(2, 40), rollouts)


def test_replayed_rollouts_must_fit_the_batch():
    model = keras_ebft.EBFTModel(
        llama(num_layers=1), keras_ebft.ReplaySampler(TOKENS, stride=4), seed=0
    )
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(1, 2, 3, 4\)"):
        model.rollout(documents(1, 24))
