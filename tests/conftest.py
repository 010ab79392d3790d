"""Shared fixtures: reference vectors and the tiny checkpoints they were made with."""

import functools
import gc
import os
from pathlib import Path

import early_triton  # noqa: F401 (before anything else)
import helpers
import keras
import keras_hub
import numpy as np
import pytest

import keras_ebft

LEFT_OUT = [pytest.mark.slow, pytest.mark.slow_compiled]
DATA = Path(__file__).parent / "data"
CLASSES = {
    "llama": keras_hub.models.LlamaCausalLM,
    "gpt2": keras_hub.models.GPT2CausalLM,
}


class Pipeline:
    """One reference run of the authors' code, and our model on its checkpoint."""

    def __init__(self, family):
        self.family = family
        self.values = np.load(DATA / f"pipeline_{family}.npz")
        backbone = keras_hub.models.Backbone.from_preset(str(DATA / family))
        self.causal_lm = CLASSES[family](backbone)
        self.prompt = self.values["prompt"]
        self.generated = self.values["generated"]

    def sampler(self):
        _, context_length, _, stride, *_ = (int(v) for v in self.values["config"])
        return keras_ebft.ReplaySampler(
            self.generated,
            stride=stride,
            context_length=context_length,
            temperature=float(self.values["temperature"]),
        )

    @functools.cached_property
    def default_model(self):
        """One model for all tests that need no options: it compiles once."""
        return self.model(ce_weight=0.03)

    def model(self, **options):
        return keras_ebft.EBFTModel(
            self.causal_lm, sampler=self.sampler(), seed=0, **options
        )


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def pipeline(request):
    return Pipeline(request.param)


@pytest.fixture
def products_that_are_counted():
    """PyTorch's counter of operations does not know oneDNN's."""
    keras_ebft.kernels.set_implementation("projection", "reference")
    yield
    keras_ebft.kernels.set_implementation("projection", None)


@pytest.fixture(scope="module", autouse=True)
def few_collections():
    """Keeps the garbage collector from what earlier modules left.

    Compiled programs leave millions of objects that live on in caches: going through
    them again and again took half of the time on JAX.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionstart():
    """TensorFlow's own seed; see `helpers.set_random_seed`."""
    keras.utils.set_random_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same draws whichever tests ran before, fixtures of the module included."""
    helpers.set_random_seed(0)


def pytest_unconfigure():
    """Lets everything end that was kept from the collector."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def reward_vectors():
    return np.load(DATA / "rewards.npz")


@pytest.fixture(scope="session")
def layout_vectors():
    return np.load(DATA / "layout.npz")


@pytest.fixture(scope="session")
def byte_lm():
    return helpers.byte_causal_lm()


def is_left_out(item):
    """Whether compiling costs minutes here and nothing is asked of the compiler."""
    backend = keras.backend.backend()
    if backend == "torch":
        return False
    if backend == "tensorflow" and item.get_closest_marker("not_on_tensorflow"):
        return True
    if any(map(item.get_closest_marker, ("on_torch", "slow_compiled"))):
        return True
    return bool(
        item.get_closest_marker("slow") and not item.get_closest_marker("compiled")
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what need not run where a backend compiles; see the markers."""
    if os.environ.get("EVERY_TEST"):
        return
    config.hook.pytest_deselected(items=[i for i in items if is_left_out(i)])
    items[:] = [item for item in items if not is_left_out(item)]


def pytest_generate_tests(metafunc):
    """Contracts of kernels are tested with the specs of their path.

    A class with `fast`, names of specs, leaves all others to the slow tests, and
    where a backend compiles (or Pallas is interpreted) to `EVERY_TEST`.
    """
    specs = getattr(metafunc.cls, "specs", None)
    if specs is None:
        return
    fast = getattr(metafunc.cls, "fast", None)
    chosen = {
        "spec": specs.SPECS,
        "bfloat16_spec": [s for s in specs.SPECS if s.name in metafunc.cls.bfloat16],
    }
    for name, values in chosen.items():
        if name in metafunc.fixturenames:
            marks = {s: fast and s.name not in fast for s in values}
            parameters = [
                pytest.param(s, id=s.name, marks=LEFT_OUT if is_slow else [])
                for s, is_slow in marks.items()
            ]
            metafunc.parametrize(name, parameters)
