"""The Pallas kernels without their chips: interpreted, and lowered for each."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from helpers import flat
from kernel_contracts import (
    LinearLogprobContract,
    StridedAttentionContract,
    error,
    expected,
    implementation,
)

from keras_ebft.kernels.linear_logprob import specs as logprob_specs
from keras_ebft.kernels.strided_attention import specs as strided_specs

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Pallas is a kernel language of JAX."
)


def module_of(op, platform):
    """A kernel's module; as an attribute, the path's function hides its package."""
    return importlib.import_module(f"keras_ebft.kernels.{op}.jax_pallas_{platform}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along every axis, the last of them ragged."""
    for op in ("linear_logprob", "strided_attention"):
        tpu = module_of(op, "tpu")
        monkeypatch.setattr(tpu, "LANES", 8)
    for name in ("KEY_TILE", "OWN_KEY_TILE", "MAX_ROW_TILE"):
        monkeypatch.setattr(module_of("strided_attention", "tpu"), name, 8)
    monkeypatch.setattr(module_of("linear_logprob", "tpu"), "MAX_TILE", 32)
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


@pytest.mark.usefixtures("small_tiles")
class TestLogprobTpu(LinearLogprobContract):
    name = "pallas_tpu"


@pytest.mark.usefixtures("small_tiles")
class TestLogprobGpu(LinearLogprobContract):
    name = "pallas_gpu"


@pytest.mark.usefixtures("small_tiles")
class TestStridedTpu(StridedAttentionContract):
    name = "pallas_tpu"


@pytest.mark.usefixtures("small_tiles")
class TestStridedGpu(StridedAttentionContract):
    name = "pallas_gpu"


CONTRACTS = [TestLogprobTpu, TestStridedTpu]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.op)
def test_no_races_and_nothing_unwritten_on_tpu(contract, monkeypatch):
    """The TPU's interpreter: memory starts as not-a-number, copies are watched."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu

    monkeypatch.setattr(module_of("linear_logprob", "tpu"), "MAX_TILE", 128)
    for name in ("KEY_TILE", "MAX_ROW_TILE"):
        monkeypatch.setattr(module_of("strided_attention", "tpu"), name, 128)
    interpret = tpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="uninitialized",
    )
    # More than one tile of rows, of keys and of the vocabulary.
    spec = {
        "linear_logprob": dataclasses.replace(logprob_specs.SPECS[-1], rows=130),
        "strided_attention": dataclasses.replace(
            strided_specs.SPECS[-1], batch=1, length=140, blocks=16, stride=8
        ),
    }[contract.op]
    found = contract().measured(
        spec, lambda *tensors, **options: contract().run(
            *tensors, interpret=interpret, **options
        ),
    )
    assert not interpret_pallas_call.races.races_found
    assert error(flat(found[0]), flat(expected(contract, spec)[0])) < 1e-5
    assert error(flat(found[1]), flat(expected(contract, spec)[1])) < 1e-5


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


def cases():
    """The benchmarks' shapes with every option, and sizes that divide nothing."""
    logprob = dataclasses.replace(logprob_specs.BENCHMARK, rows=1000, vocabulary=4001)
    yield "linear_logprob", logprob, LOGPROB
    yield "linear_logprob", dataclasses.replace(logprob, width=72), {}
    for head_size in (64, 80, 128, 256):
        strided = dataclasses.replace(
            strided_specs.BENCHMARK, heads=8, kv_heads=2, head_size=head_size
        )
        yield "strided_attention", strided, STRIDED
    decode = dataclasses.replace(strided, queries=1, keys=7, blocks=33, length=275)
    yield "strided_attention", decode, {"scale": 0.1, "query_offset": 3}


CASES = [
    pytest.param(*case, dtype, id=f"{case[0]}-{number}-{dtype}")
    for number, case in enumerate(cases())
    for dtype in ("bfloat16", "float32")
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
    assert process.stdout.count("compiled in") == 12
