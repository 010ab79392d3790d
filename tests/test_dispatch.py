"""The choice between implementations: by record, forced, refused, logged."""

import ast
import dataclasses
import logging
import os
import subprocess
import sys

import keras
import pytest
from helpers import documents, llama
from keras import ops

import keras_ebft
from keras_ebft import kernels
from keras_ebft.backend.device import Device, device_of
from keras_ebft.kernels import dispatch, qualification

OPS = (
    "causal_attention",
    "feature_reward",
    "linear_logprob",
    "linear_sample",
    "projection",
    "strided_attention",
)
BACKEND = keras.backend.backend()
CPU = Device("cpu")


@pytest.fixture(autouse=True)
def automatic():
    """Every test begins and ends with the automatic choice."""
    yield
    for op in OPS:
        kernels.set_implementation(op, None)


@pytest.fixture
def path(monkeypatch):
    """Registers a path of two made-up implementations; calls return their names."""
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))

    def make(**supports):
        dispatch.register(
            "made_up",
            (
                dispatch.Implementation("fast", f"{__name__}:fast", **supports),
                dispatch.Implementation("plain", f"{__name__}:plain"),
            ),
        )
        return dispatch

    yield make
    dispatch._select.cache_clear()
    dispatch._candidates.cache_clear()
    dispatch._forced.pop("made_up", None)


def fast():
    return "fast"


def plain():
    return "plain"


def call(**changes):
    values = {
        "op": "made_up",
        "backend": "torch",
        "device": Device("cuda", (9, 0)),
        "dtypes": frozenset(["bfloat16"]),
        "head_size": 64,
        "options": frozenset(["starts"]),
    }
    return dispatch.Call(**{**values, **changes})


RECORD = {
    "backends": ("torch",),
    "platforms": ("cuda",),
    "forced_platforms": ("cpu",),
    "min_capability": (8, 0),
    "dtypes": ("float32", "bfloat16"),
    "head_sizes": range(16, 257, 16),
    "options": ("starts", "soft_cap"),
    "packages": ("numpy",),
}


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("changes", "supports", "reason"),
    [
        ({}, {}, None),
        ({"backend": "jax"}, {}, "the backend torch, not jax"),
        ({"device": Device("rocm")}, {}, "a device of kind cuda, not rocm"),
        ({"device": CPU}, {}, "a device of kind cuda, not cpu"),
        ({"device": Device("cuda", (7, 5))}, {}, "compute capability (8, 0) or more"),
        ({"dtypes": frozenset(["float16"])}, {}, "one dtype of float32 or bfloat16"),
        (
            {"dtypes": frozenset(["float32", "bfloat16"])},
            {},
            "one dtype of float32 or bfloat16, not bfloat16, float32",
        ),
        ({"head_size": 40}, {}, "a head size in range(16, 257, 16), not 40"),
        (
            {"options": frozenset(["starts", "sliding_window"])},
            {},
            "a call without sliding_window",
        ),
        ({}, {"packages": ("no_such_package",)}, "the package no_such_package"),
    ],
)
def test_a_record_says_what_it_lacks(changes, supports, reason):
    record = dispatch.Implementation("fast", "nowhere:none", **{**RECORD, **supports})
    refusal = record.refusal(call(**changes))
    if reason is None:
        assert refusal is None
    else:
        assert reason in refusal


@pytest.mark.backend_independent
def test_some_platforms_are_for_forced_choices_only():
    record = dispatch.Implementation("fast", "nowhere:none", **RECORD)
    assert record.refusal(call(device=CPU)) is not None
    assert record.refusal(call(device=CPU), forced=True) is None


def run(**options):
    return dispatch.choose("made_up", (ops.ones((2,)),), **options)()


def test_the_first_implementation_that_fits_runs(path):
    path(options=("starts",))
    assert run() == "fast"
    assert run(options=("starts",)) == "fast"
    assert run(options=("starts", "soft_cap")) == "plain"
    path(dtypes=("bfloat16",))
    assert run() == "plain"
    path(platforms=("abacus",), forced_platforms=("cpu",))
    assert run() == "plain"
    kernels.set_implementation("made_up", "fast")
    assert run() == "fast"
    kernels.set_implementation("made_up", None)
    assert run() == "plain"


def test_what_is_forced_runs_or_raises(path, monkeypatch):
    path(options=("starts",))
    kernels.set_implementation("made_up", "plain")
    assert run() == "plain"
    kernels.set_implementation("made_up", "fast")
    with pytest.raises(ValueError, match=r"a call without soft_cap.*\['plain'\]"):
        run(options=("soft_cap",))
    kernels.set_implementation("made_up", None)
    monkeypatch.setenv("KERAS_EBFT_KERNELS", " made_up = plain ,")
    assert run() == "plain"
    # The function has precedence over the environment.
    kernels.set_implementation("made_up", "fast")
    assert run() == "fast"


def test_an_error_inside_an_implementation_is_not_hidden(path, monkeypatch):
    path()

    def broken():
        raise RuntimeError("broken")

    monkeypatch.setattr(sys.modules[__name__], "fast", broken)
    dispatch._load.cache_clear()
    with pytest.raises(RuntimeError, match="broken"):
        run()
    dispatch._load.cache_clear()


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("linear", "reference", "Expected `op` to be one of"),
        ("linear_sample", "quick", "one of .*chunked.*Received: 'quick'"),
    ],
)
def test_unknown_names_are_refused(op, name, message):
    with pytest.raises(ValueError, match=message):
        kernels.set_implementation(op, name)


@pytest.mark.parametrize(
    "value", ["linear_sample", "linear=reference", "linear_sample=quick", "=reference"]
)
def test_a_wrong_environment_variable_is_refused(value, monkeypatch):
    monkeypatch.setenv("KERAS_EBFT_KERNELS", value)
    with pytest.raises(ValueError, match="KERAS_EBFT_KERNELS"):
        linear_sample()


def linear_sample():
    return kernels.linear_sample(ops.ones((1, 2)), ops.ones((3, 2)), ops.ones((1,)))


def test_names_given_twice_are_refused():
    record = dispatch.Implementation("one", "nowhere:none")
    with pytest.raises(ValueError, match="different names"):
        dispatch.register("made_up", (record, record))


@pytest.mark.parametrize("op", OPS)
def test_every_path_has_a_definition_that_runs_everywhere(op):
    last = kernels.implementations(op)[-1]
    assert last.name == "reference"
    for backend in dispatch.BACKENDS:
        for device in (CPU, Device("abacus"), Device("cuda", (5, 0))):
            everything = call(
                backend=backend,
                device=device,
                dtypes=frozenset(["float64", "int4"]),
                head_size=1,
                options=frozenset(["anything"]),
            )
            assert last.refusal(everything) is None


def test_tensors_are_where_they_are():
    tensor = ops.ones((2,))
    assert device_of(tensor) == device_of(keras.Variable(tensor))
    expected = "cpu"
    if BACKEND == "torch":
        expected = tensor.device.type
        assert device_of(tensor.to("meta")) == Device("meta")
    assert device_of(tensor).platform == expected


def test_traced_tensors_are_where_the_backend_puts_them():
    if BACKEND == "torch":
        pytest.skip("PyTorch traces nothing here: tensors always have a device")
    found = []

    def function(x):
        found.append(device_of(x))
        return x

    if BACKEND == "jax":
        import jax

        jax.jit(function)(ops.ones((2,)))
    else:
        import tensorflow as tf

        tf.function(function)(ops.ones((2,)))
    assert found == [device_of(ops.ones((2,)))]


def test_a_distribution_is_an_option_of_every_call(path, monkeypatch):
    path(options=())
    assert run() == "fast"
    monkeypatch.setattr(keras.distribution, "distribution", object)
    assert run() == "plain"


@pytest.mark.slow_compiled
def test_fit_logs_once_which_implementations_run(caplog):
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=4, context_length=4, num_samples=2
    )
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(llama(num_layers=1), sampler, network, seed=0)
    model.compile("sgd")
    x = documents(4, 10)
    caplog.set_level(logging.INFO, "keras_ebft")

    def logged():
        messages = [r.message for r in caplog.records if "Kernels" in r.message]
        caplog.clear()
        return messages

    model.fit(x, batch_size=2, validation_data=x[:2], verbose=0)
    (message,) = logged()
    for op in OPS:
        assert f"{op}=" in message
    assert "linear_logprob=reference" not in message
    # Nothing is compiled anew, and yet known.
    model.fit(x, batch_size=2, verbose=0)
    assert logged() == [message]

    kernels.set_implementation("linear_logprob", "reference")
    model.compile("sgd")
    model.fit(x, batch_size=2, verbose=0)
    (message,) = logged()
    assert "linear_logprob=reference" in message


def small_call(op, dtype="float32"):
    """Calls a path with tensors of a few numbers, without any option."""

    def ones(*shape):
        return ops.ones(shape, dtype)

    heads, block = ones(1, 4, 2, 8), ones(1, 1, 1, 4, 2, 8)
    rows, places = ones(2, 16), ops.zeros((2,), "int32")
    return {
        "causal_attention": lambda: kernels.causal_attention(*[heads] * 3, scale=1.0),
        "feature_reward": lambda: kernels.feature_reward(
            ones(1, 2, 1, 1, 4), ones(1, 1, 1, 4)
        ),
        "linear_logprob": lambda: kernels.linear_logprob(rows, rows, places),
        "linear_sample": lambda: kernels.linear_sample(rows, rows, ops.ones((2,)) / 2),
        "projection": lambda: kernels.projection(rows, ones(16, 3)),
        "strided_attention": lambda: kernels.strided_attention(*[block] * 3, scale=1.0),
    }[op]()


RECORDS = [(op, record.name) for op in OPS for record in kernels.implementations(op)]


def test_what_is_forced_holds_in_calls_of_known_shapes():
    """JAX and TensorFlow keep programs of a call, with the choices within."""
    for name in ("matrices", "reference"):
        kernels.set_implementation("projection", name)
        with kernels.watch_choices() as choices:
            kernels.set_implementation("linear_logprob", "chunked")
            small_call("linear_logprob")
        assert choices["projection"] == {name}


@pytest.mark.parametrize(("op", "name"), RECORDS)
def test_every_implementation_that_is_forced_runs_or_raises(op, name):
    record = next(r for r in kernels.implementations(op) if r.name == name)
    kernels.set_implementation(op, name)
    dtype = (record.dtypes or ["float32"])[0]
    platform = device_of(ops.ones((1,))).platform
    able = BACKEND in record.backends and (
        record.platforms is None
        or platform in record.platforms + record.forced_platforms
    )
    with kernels.watch_choices() as choices:
        if able:
            small_call(op, dtype)
        else:
            with pytest.raises(ValueError, match=f"forced by set_impl.*'{name}', but"):
                small_call(op, dtype)
    # An implementation may make choices of its own, of a product.
    assert choices.get(op) == ({name} if able else None)


@pytest.mark.backend_independent
def test_kernels_are_not_chosen_for_hardware_that_they_have_not_run_on():
    for op, name in RECORDS:
        if name in ("triton", "pallas_tpu", "pallas_gpu"):
            assert next(
                r for r in kernels.implementations(op) if r.name == name
            ).unproven


@pytest.mark.backend_independent
def test_records_do_not_change():
    record = dispatch.Implementation("fast", "nowhere:none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.unproven = True


@pytest.mark.slow
@pytest.mark.compiled
def test_the_library_runs_without_kernel_languages():
    """A process in which neither Triton nor Pallas can be imported.

    Keras itself imports Pallas on JAX, so that it is never missing there.
    """
    script = """
import sys
# Importing what is None there raises ModuleNotFoundError.
sys.modules["triton"] = None
import keras
if keras.backend.backend() != "jax":
    sys.modules["jax.experimental.pallas"] = None
import keras_ebft
from keras_ebft import kernels
from test_dispatch import OPS, small_call
with kernels.watch_choices() as choices:
    for op in OPS:
        small_call(op)
print(sorted(set.union(*choices.values())))
for language in ("triton", "jax.experimental.pallas"):
    assert sys.modules.get(language) is None or keras.backend.backend() == "jax"
kernels.set_implementation("linear_sample", "triton")
try:
    small_call("linear_sample")
except ValueError as error:
    print("raises" if BACKEND_MESSAGE in str(error) else error)
"""
    message = (
        "triton, which is not installed" if BACKEND == "torch" else "backend torch"
    )
    process = subprocess.run(
        [sys.executable, "-c", script.replace("BACKEND_MESSAGE", repr(message))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    chosen, raised = process.stdout.split("\n")[-3:-1]
    plain = {"blockwise", "chunked", "fused", "in_place", "matrices", "onednn"}
    plain.add("reference")
    assert set(ast.literal_eval(chosen)) <= plain
    assert raised == "raises"


def test_what_is_not_proven_runs_if_it_passes_or_is_forced(path, monkeypatch):
    verdicts = {}
    monkeypatch.setattr(
        qualification, "passes", lambda trial, words: verdicts[trial.name]
    )
    path(unproven=True)
    verdicts["fast"] = False
    assert run() == "plain"
    verdicts["fast"] = True
    assert run() == "fast"
    verdicts.clear()
    kernels.set_implementation("made_up", "fast")
    assert run() == "fast"


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_kernels_in_parts_are_not_reshaped(backend):
    """What lies on several devices would be sent between them."""

    def chosen(*options):
        call = dispatch.Call(
            "projection",
            backend,
            Device("cpu", None, "GenuineIntel"),
            frozenset(["float32"]),
            options=frozenset(options),
        )
        return dispatch._select(call, None, None).name

    assert chosen() == "matrices"
    assert chosen("distribution") == "reference"
