"""The Pallas kernels without their chips: interpreted, and lowered for each."""

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from helpers import documents, flat, llama, to_numpy
from kernel_contracts import (
    FLOAT32_TOLERANCE,
    FeatureRewardContract,
    LinearLogprobContract,
    LinearSampleContract,
    StridedAttentionContract,
    error,
    expected,
    implementation,
)

import keras_ebft
from keras_ebft import kernels
from keras_ebft.kernels.feature_reward import specs as reward_specs
from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.linear_sample import specs as sample_specs
from keras_ebft.kernels.strided_attention import specs as strided_specs

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        keras.backend.backend() != "jax", reason="Pallas is a kernel language of JAX."
    ),
]


FORCED = ("feature_reward", "linear_logprob", "linear_sample", "strided_attention")


def module_of(op, platform):
    """A kernel's module; as an attribute, the path's function hides its package."""
    return importlib.import_module(f"keras_ebft.kernels.{op}.jax_pallas_{platform}")


def head_tpu():
    """What the TPU kernels over the output head share."""
    return importlib.import_module("keras_ebft.kernels.jax_pallas_head_tpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along every axis, the last of them ragged."""
    monkeypatch.setattr(module_of("strided_attention", "tpu"), "LANES", 8)
    monkeypatch.setattr(head_tpu(), "LANES", 8)
    monkeypatch.setattr(head_tpu(), "MAX_TILE", 32)
    for name in ("KEY_TILE", "OWN_KEY_TILE", "MAX_ROW_TILE"):
        monkeypatch.setattr(module_of("strided_attention", "tpu"), name, 8)
    tiles = module_of("strided_attention", "gpu").TILES
    monkeypatch.setattr(
        module_of("strided_attention", "gpu"),
        "TILES",
        dict.fromkeys(tiles, (16, 16, 4, 2)),
    )
    gpu = module_of("linear_logprob", "gpu")
    monkeypatch.setattr(gpu, "ROW_TILE", 16)
    monkeypatch.setattr(gpu, "VOCABULARY_TILE", 32)
    monkeypatch.setattr(gpu, "PROGRAMS", 8)
    # One row tile of gradients at a time.
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module_of("linear_sample", "gpu"), "ROW_TILE", 16)
    monkeypatch.setattr(module_of("linear_sample", "tpu"), "GROUPS_PER_STEP", 4)
    reward = module_of("feature_reward", "tpu")
    monkeypatch.setattr(reward, "LANES", 8)
    monkeypatch.setattr(reward, "BLOCKS", (2, 2))
    monkeypatch.setattr(reward, "TILE_BYTES", 4096)
    tiles = module_of("feature_reward", "gpu").TILES
    monkeypatch.setattr(
        module_of("feature_reward", "gpu"), "TILES", dict.fromkeys(tiles, (16, 2))
    )


@pytest.mark.usefixtures("small_tiles")
class TestLogprobTpu(LinearLogprobContract):
    fast = ("everything",)
    name = "pallas_tpu"

    @pytest.mark.slow
    def test_a_planted_wrong_gradient_is_noticed(self):
        super().test_a_planted_wrong_gradient_is_noticed()


@pytest.mark.usefixtures("small_tiles")
class TestLogprobGpu(LinearLogprobContract):
    fast = ("everything",)
    name = "pallas_gpu"


@pytest.mark.usefixtures("small_tiles")
class TestSampleTpu(LinearSampleContract):
    name = "pallas_tpu"


@pytest.mark.usefixtures("small_tiles")
class TestSampleGpu(LinearSampleContract):
    name = "pallas_gpu"


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
class TestRewardTpu(FeatureRewardContract):
    fast = ("one_sample", "deficient_feature", "everything")
    name = "pallas_tpu"


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
class TestRewardGpu(FeatureRewardContract):
    fast = ("one_sample", "deficient_feature", "everything")
    name = "pallas_gpu"


class MostlySlow(StridedAttentionContract):
    """Compiling an interpreted kernel and its gradients takes seconds a call."""

    fast = ("everything",)

    @pytest.mark.slow
    def test_a_planted_wrong_gradient_is_noticed(self):
        super().test_a_planted_wrong_gradient_is_noticed()

    @pytest.mark.slow
    def test_equals_float64_and_its_finite_differences(self):
        super().test_equals_float64_and_its_finite_differences()


@pytest.mark.usefixtures("small_tiles")
class TestStridedTpu(MostlySlow, StridedAttentionContract):
    name = "pallas_tpu"


@pytest.mark.usefixtures("small_tiles")
class TestStridedGpu(MostlySlow, StridedAttentionContract):
    name = "pallas_gpu"


WATCHED = [
    pytest.param(TestLogprobTpu, id="linear_logprob"),
    # Half a minute where there is one core only.
    pytest.param(TestStridedTpu, id="strided_attention", marks=pytest.mark.slow),
]


def watchful_interpreter():
    """Memory starts as not-a-number, copies are watched."""
    from jax.experimental.pallas import tpu

    return tpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="uninitialized",
    )


def races_found():
    """Whether the last kernel that was watched had any."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("contract", WATCHED)
def test_no_races_and_nothing_unwritten_on_tpu(contract, monkeypatch):
    """The TPU's interpreter: memory starts as not-a-number, copies are watched."""
    monkeypatch.setattr(head_tpu(), "MAX_TILE", 128)
    for name in ("KEY_TILE", "MAX_ROW_TILE"):
        monkeypatch.setattr(module_of("strided_attention", "tpu"), name, 128)
    interpret = watchful_interpreter()
    # More than one tile of rows, of keys and of the vocabulary.
    spec = {
        "linear_logprob": dataclasses.replace(logprob_specs.SPECS[-1], rows=130),
        "strided_attention": dataclasses.replace(
            strided_specs.SPECS[-1],
            batch=1,
            heads=2,
            kv_heads=1,
            length=140,
            blocks=16,
            stride=8,
        ),
    }[contract.op]
    found = contract().measured(
        spec,
        lambda *tensors, **options: contract().run(
            *tensors, interpret=interpret, **options
        ),
    )
    assert not races_found()
    for one, two in zip(found, expected(contract, spec)):
        assert error(flat(one), flat(two)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampling_has_no_races_and_leaves_nothing_unwritten_on_tpu(
    temperature, monkeypatch
):
    """Two tiles of rows, three of the vocabulary, the last of them ragged."""
    monkeypatch.setattr(head_tpu(), "MAX_TILE", 128)
    spec = sample_specs.Spec("watched", rows=130, temperature=temperature, soft_cap=2.0)
    contract = TestSampleTpu()
    contract.check_tokens(
        spec, functools.partial(contract.run, interpret=watchful_interpreter())
    )
    assert not races_found()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_groups_past_the_vocabulary_weigh_nothing_on_tpu(temperature):
    """Of the second tile of 512 tokens only 8 are there: three groups are empty."""
    spec = sample_specs.Spec("ragged", rows=20, vocabulary=520, temperature=temperature)
    TestSampleTpu().check_tokens(spec)


def test_rewards_have_no_races_and_leave_nothing_unwritten_on_tpu(monkeypatch):
    """Two tiles of blocks in both kernels, the last ragged, three of each feature."""
    reward = module_of("feature_reward", "tpu")
    monkeypatch.setattr(reward, "LANES", 8)
    monkeypatch.setattr(reward, "BLOCKS", (1, 8))
    spec = reward_specs.Spec(
        "watched", batch=1, samples=3, blocks=10, features=2, width=20, unbiased=True
    )
    contract = TestRewardTpu()
    contract.check(
        spec, functools.partial(contract.run, interpret=watchful_interpreter())
    )
    assert not races_found()


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_tiling_leaves_tokens_as_they_are(platform, small_tiles, monkeypatch):
    """Whole and small tiles: the same numbers draw the same tokens."""
    spec = sample_specs.Spec("tiled", rows=300, vocabulary=1000, temperature=0.7)
    arrays = [keras.ops.convert_to_tensor(array) for array in spec.arrays().values()]
    found = []
    for tile in (None, 16, 128, 512):
        if tile and platform == "tpu":
            monkeypatch.setattr(head_tpu(), "MAX_TILE", tile)
            rows_at_once = {16: 1, 128: 2, 512: 8}[tile]
            sample = module_of("linear_sample", "tpu")
            monkeypatch.setattr(sample, "GROUPS_PER_STEP", rows_at_once)
        elif tile:
            monkeypatch.setattr(module_of("linear_sample", "gpu"), "ROW_TILE", tile)
        run = implementation("linear_sample", f"pallas_{platform}").load()
        tokens, _ = run(*arrays, spec.places(), **spec.options())
        found.append(to_numpy(tokens))
    for tokens in found[1:]:
        assert (tokens == found[0]).all()
    assert len(set(found[0].tolist())) > 100


LOGPROB = {"temperature": 0.6, "soft_cap": 30.0}
STRIDED = {"scale": 0.1, "sliding_window": 300, "soft_cap": 30.0}


def call_and_gradients(op, name, spec, dtype, options):
    """A function of shaped arrays that runs a kernel and its backward pass."""
    import jax

    run = implementation(op, name).load()
    arrays = [jax.ShapeDtypeStruct(a.shape, dtype) for a in spec.arrays().values()]
    places = spec.places()
    places = places if isinstance(places, tuple) else (places,)

    def summed(*arrays):
        outputs = run(*arrays, *places[:1], interpret=False, **options)
        return sum(out.astype("float32").sum() for out in jax.tree.leaves(outputs))

    function = jax.value_and_grad(summed, argnums=tuple(range(len(arrays))))
    return jax.jit(function), arrays


LOGPROB_SPEC = logprob_specs.Spec("head", rows=600, width=256, vocabulary=4001)
STRIDED_SPEC = strided_specs.Spec(
    "blocks", blocks=33, queries=8, keys=8, heads=8, length=300, stride=8
)


def strided(head_size, **changes):
    return dataclasses.replace(STRIDED_SPEC, head_size=head_size, **changes)


# Every option, several tiles on every side, sizes that divide nothing; a step of
# decoding is the last.
CASES = [
    ("linear_logprob", LOGPROB_SPEC, LOGPROB, "bfloat16"),
    ("linear_logprob", dataclasses.replace(LOGPROB_SPEC, width=72), {}, "float32"),
    ("strided_attention", strided(64, tensor_anchors=True), STRIDED, "bfloat16"),
    ("strided_attention", strided(80), {"scale": 0.1}, "float32"),
    ("strided_attention", strided(256), STRIDED, "bfloat16"),
    (
        "strided_attention",
        strided(128, queries=1, keys=7),
        {"scale": 0.1, "query_offset": 3},
        "float32",
    ),
]


@pytest.mark.parametrize(("op", "spec", "options", "dtype"), CASES)
def test_lowers_for_tpu(op, spec, options, dtype):
    import jax

    function, arrays = call_and_gradients(op, "pallas_tpu", spec, dtype, options)
    exported = jax.export.export(function, platforms=["tpu"])(*arrays)
    kernels = {"linear_logprob": 3, "strided_attention": 4}[op]
    assert exported.mlir_module().count("@tpu_custom_call") == kernels


@pytest.mark.parametrize(("op", "spec", "options", "dtype"), CASES)
def test_lowers_for_gpu(op, spec, options, dtype):
    function, arrays = call_and_gradients(op, "pallas_gpu", spec, dtype, options)
    lowered = function.trace(*arrays).lower(lowering_platforms=("cuda",))
    kernels = {"linear_logprob": 2, "strided_attention": 4}[op]
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == kernels


def products_in(jaxpr):
    """`dot_general` equations of a jaxpr, those of its kernels too."""
    import jax.extend

    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products_in(inner)


@pytest.mark.parametrize("asked", [None, "tensorfloat32"])
@pytest.mark.parametrize(("op", "spec", "options", "dtype"), CASES)
def test_products_on_gpu_are_as_exact_as_asked_for(op, spec, options, dtype, asked):
    """Left to itself Triton cuts float32 to TensorFloat-32, which a GPU alone shows."""
    import jax

    function, arrays = call_and_gradients(op, "pallas_gpu", spec, dtype, options)
    with jax.default_matmul_precision(asked):
        products = list(products_in(function.trace(*arrays).jaxpr.jaxpr))
        of_plain = jax.make_jaxpr(jax.numpy.dot)(*[jax.numpy.ones((2, 2))] * 2)
    assert len(products) > 3
    precisions = {str(equation.params["precision"]) for equation in products}
    if asked or dtype == "bfloat16":
        assert precisions == {str(of_plain.eqns[0].params["precision"])}
    else:
        assert precisions == {"TF32_TF32_F32_X3"}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_log_probabilities_have_no_logits_in_memory(platform, monkeypatch):
    """Forward and backward; on GPU gradients of logits exist for 128 rows at a time."""
    import jax

    spec = LOGPROB_SPEC
    monkeypatch.setattr(module_of("linear_logprob", "gpu"), "CHUNK_BYTES", 1)
    function, arrays = call_and_gradients(
        "linear_logprob", f"pallas_{platform}", spec, "bfloat16", LOGPROB
    )
    if platform == "tpu":
        text = jax.export.export(function, platforms=["tpu"])(*arrays).mlir_module()
    else:
        lowered = function.trace(*arrays).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
    large = [s for s in sizes_in(text) if max(s) >= spec.vocabulary]
    assert large
    rows = [min(s) for s in large if len(s) > 1 and spec.width not in s]
    assert max(rows, default=0) <= 128 < spec.rows
    assert rows or platform == "tpu"


# Options, dtype, kernels: greedy needs no second pass.
SAMPLING = [
    ({"temperature": 0.6, "soft_cap": 30.0}, "bfloat16", 2),
    ({}, "float32", 2),
    ({"temperature": 0.0}, "bfloat16", 1),
]
# The rollouts of one document, and a shape that divides nothing.
SHAPES = [(508, 2048, 128256), (37, 200, 300)]


def sampling(name, options, dtype, shape):
    """A compiled kernel and the shapes of its arguments."""
    import jax

    rows, width, vocabulary = shape
    run = implementation("linear_sample", name).load()
    arrays = [(rows, width), (vocabulary, width), (rows,)]
    arrays = [
        jax.ShapeDtypeStruct(array, kind)
        for array, kind in zip(arrays, (dtype, dtype, "float32"))
    ]
    return jax.jit(functools.partial(run, interpret=False, **options)), arrays


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("options", "dtype", "kernels"), SAMPLING)
def test_sampling_lowers_for_tpu(options, dtype, kernels, shape):
    import jax

    function, arrays = sampling("pallas_tpu", options, dtype, shape)
    exported = jax.export.export(function, platforms=["tpu"])(*arrays)
    text = exported.mlir_module()
    assert text.count("@tpu_custom_call") == kernels
    assert_no_logits(text, shape)


def test_products_of_sampling_on_gpu_are_float32():
    function, arrays = sampling("pallas_gpu", {}, "float32", SHAPES[1])
    products = products_in(function.trace(*arrays).jaxpr.jaxpr)
    precisions = {str(equation.params["precision"]) for equation in products}
    assert precisions == {"TF32_TF32_F32_X3"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("options", "dtype", "kernels"), SAMPLING)
def test_sampling_lowers_for_gpu(options, dtype, kernels, shape):
    function, arrays = sampling("pallas_gpu", options, dtype, shape)
    text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == kernels
    assert_no_logits(text, shape)


def sizes_in(text):
    """The sides of every tensor that a lowered program names."""
    return [
        [int(size) for size in found.split("x")[:-1]]
        for found in re.findall(r"tensor<((?:\d+x)+)", text)
    ]


def assert_no_logits(text, shape):
    """Nothing but the head is as large as the vocabulary; rows are fewer than wide."""
    rows, width, vocabulary = shape
    sizes = sizes_in(text)
    # What is kept per group of 128 tokens, of a few more where tiles are larger.
    groups = -(-vocabulary // 128)
    assert any(s[0] == rows and groups <= s[-1] < groups + 4 for s in sizes)
    large = [s for s in sizes if max(s) >= vocabulary]
    assert large
    assert all(s[0] == vocabulary and s[1] >= width for s in large), large


# Every number of samples is a kernel of its own; the last is of a real model.
REWARDS = [
    (dataclasses.replace(spec, batch=1), dtype)
    for spec in reward_specs.SPECS
    for dtype in ("float32", "bfloat16")
    if spec.name in ("one_sample", "sixteen", "feature", "no_whitening", "everything")
]
REWARDS.append((reward_specs.BENCHMARK, "float32"))


def rewarding(name, spec, dtype):
    """A compiled kernel and the shapes of its arguments."""
    import jax

    run = implementation("feature_reward", name).load()
    run = functools.partial(run, interpret=False, **spec.options())
    lead = (spec.batch, spec.samples, spec.blocks, spec.features, spec.width)
    shapes = [lead, (lead[0], *lead[2:])]
    return jax.jit(run), [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@pytest.mark.parametrize(("spec", "dtype"), REWARDS)
def test_rewards_lower_for_tpu(spec, dtype):
    import jax

    function, arrays = rewarding("pallas_tpu", spec, dtype)
    exported = jax.export.export(function, platforms=["tpu"])(*arrays)
    assert exported.mlir_module().count("@tpu_custom_call") == 2


@pytest.mark.parametrize(("spec", "dtype"), REWARDS)
def test_rewards_lower_for_gpu(spec, dtype):
    function, arrays = rewarding("pallas_gpu", spec, dtype)
    lowered = function.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_features_are_read_once_and_written_never(platform):
    """Of what is as large as the features, only they themselves exist."""
    import jax

    spec = reward_specs.BENCHMARK
    function, arrays = rewarding(f"pallas_{platform}", spec, "float32")
    jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
    (call,) = jaxpr.eqns
    sizes = [
        [variable.aval.size for variable in equation.outvars]
        for equation in call.params["jaxpr"].eqns
        if equation.primitive.name not in ("reshape", "jit", "pad")
    ]
    assert max(flat(sizes)) < 0.1 * arrays[0].size


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_whole_step_is_the_same(name):
    """Kernels inside a compiled train step, rollouts and gradients included."""
    weights = {}
    for chosen in (None, name):
        for op in FORCED:
            kernels.set_implementation(op, chosen)
        sampler = keras_ebft.BlockSampler(3, 4, 4, num_samples=2)
        features = keras_ebft.FeatureNetwork(layers=(1, 2))
        model = keras_ebft.EBFTModel(
            llama(hidden_dim=32), sampler, features, ce_weight=0.1, seed=0
        )
        model.compile(keras.optimizers.SGD(0.1))
        with kernels.watch_choices() as choices:
            model.fit(documents(2, 22), batch_size=2, verbose=0)
        if chosen is not None:
            assert all(choices[op] == {name} for op in FORCED)
        weights[chosen] = flat(to_numpy(w) for w in model.trainable_weights)
    start = flat(to_numpy(w) for w in llama(hidden_dim=32).trainable_weights)
    assert error(weights[name] - start, weights[None] - start) < 1e-4
    assert error(weights[None], start) > 1e-4


@pytest.fixture(autouse=True)
def automatic():
    yield
    for op in FORCED:
        kernels.set_implementation(op, None)


LIBTPU = Path(sys.prefix) / "libtpu"


@pytest.mark.slow
@pytest.mark.skipif(
    not LIBTPU.exists(),
    reason="Needs the TPU compiler beside the environment, 700 MB that "
    "`make test SLOW=1` installs.",
)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiles_for_tpu(chip):
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, root / "benchmarks" / "compile_tpu.py", chip],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{LIBTPU}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("compiled in") == 26
