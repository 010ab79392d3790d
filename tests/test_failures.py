"""Whatever goes wrong in the middle of training, the model is whole and goes on."""

import keras
import numpy as np
import pytest
from helpers import documents, llama, to_numpy

import keras_ebft
from keras_ebft.backend import updates

LENGTH = 10
BACKEND = keras.backend.backend()


class FailureError(Exception):
    """What the tests raise."""


class Verifier:
    """Rewards of 1 and 0 in turn; raises in the call it was told to."""

    def __init__(self):
        self.calls_until_broken = np.inf
        self.error = FailureError

    def __call__(self, prompts, completions, targets):
        self.calls_until_broken -= 1
        if self.calls_until_broken == -1:
            raise self.error("broken verifier")
        shape = np.shape(completions)[:3]
        return np.arange(np.prod(shape)).reshape(shape) % 2


@keras.saving.register_keras_serializable("test_failures")
class Spoiled(keras.optimizers.schedules.LearningRateSchedule):
    """1.0, but not a number from step `first` to before step `end`."""

    def __init__(self, first, end):
        self.first, self.end = first, end

    def __call__(self, step):
        is_spoiled = keras.ops.logical_and(step >= self.first, step < self.end)
        return keras.ops.where(is_spoiled, np.nan, 1.0)

    def get_config(self):
        return {"first": self.first, "end": self.end}


def build(reward=None, **options):
    sampler = keras_ebft.BlockSampler(
        rollout_length=2, stride=4, context_length=4, num_samples=2
    )
    return keras_ebft.EBFTModel(
        llama(num_layers=1), sampler, reward=reward, seed=5, **options
    )


def spoiled(first, end, **options):
    """A model of next-token prediction some of whose steps are not finite."""
    model = keras_ebft.EBFTModel(
        llama(num_layers=1), policy_weight=0.0, ce_weight=Spoiled(first, end), seed=5
    )
    model.compile(keras.optimizers.Adam(0.01), **options)
    return model


def weights(model):
    """Those of the optimizer, too."""
    variables = [*model.causal_lm.variables, *model.optimizer.variables]
    return [to_numpy(variable) for variable in variables]


def state(model):
    """Weights, random generator and counts of steps and of updates in a row."""
    moved = [model._training_seed.state, model._training_steps]
    moved.append(model._skipped_updates.in_a_row)
    return [*weights(model), *map(to_numpy, moved)]


def same(first, second):
    return all((one == other).all() for one, other in zip(first, second, strict=True))


class Snapshots(keras.callbacks.Callback):
    """Keeps the state as the last batch that ended left it."""

    def on_train_begin(self, logs=None):
        self.batches, self.state = 0, state(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.batches, self.state = self.batches + 1, state(self.model)

    def on_train_end(self, logs=None):
        # Averaged weights have come to their places.
        self.state = state(self.model)


class Batches:
    """Batches of two documents, and an exception after the last if asked for."""

    def __init__(self, count, broken=False):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count + self.broken

    def __iter__(self):
        for index in range(self.count):
            yield documents(2, LENGTH, seed=index)
        if self.broken:
            raise FailureError("broken data")


class SecondReading:
    """Good batches to look at, others to train on."""

    def __init__(self, batches):
        self.batches = batches
        self.is_read = False

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        found, self.is_read = self.batches if self.is_read else Batches(1), True
        return iter(found)


def callback(moment):
    def fail(*_, **__):
        raise FailureError(f"broken {moment}")

    return keras.callbacks.LambdaCallback(**{moment: fail})


class Trained:
    """One compiled model for all the ways in which a step can fail."""

    def __init__(self):
        self.verifier = Verifier()
        self.model = build(keras_ebft.VerifierReward(self.verifier, decode=False))
        self.compile()

    def compile(self, **options):
        adam = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5)
        self.model.compile(adam, **options)

    def fails(self, x, callbacks=(), steps=0, error=FailureError, **options):
        """Trains until it fails; the model is as the last step left it."""
        snapshots = Snapshots()
        options["callbacks"] = [snapshots, *callbacks]
        with pytest.raises(error, match="brok"):
            self.model.fit(x, **options, verbose=0)
        assert snapshots.batches == steps
        assert same(state(self.model), snapshots.state)
        self.goes_on()

    def goes_on(self):
        self.verifier.calls_until_broken = np.inf
        self.verifier.error = FailureError
        before = weights(self.model)
        self.model.fit(Batches(1), verbose=0)
        after = weights(self.model)
        assert not same(before, after)
        assert all(np.isfinite(value).all() for value in after)


@pytest.fixture(scope="module")
def trained():
    return Trained()


def test_data_that_end_in_an_exception(trained):
    trained.fails(Batches(1, broken=True), steps=1)
    measured = trained.model.evaluate(Batches(1), return_dict=True, verbose=0)
    assert "reward" in measured
    assert "skipped_updates" not in measured
    trained.fails(SecondReading(Batches(0, broken=True)), steps=0)


def test_data_that_would_fail_if_there_were_more_to_train(trained):
    """What is only read ahead is no failure yet."""
    broken = iter(Batches(2, broken=True))
    options = {"steps_per_epoch": 1, "verbose": 0}
    history = trained.model.fit(broken, epochs=2, **options).history
    assert len(history["loss"]) == 2


@pytest.mark.parametrize("count", [0, 1])
def test_validation_data_that_end_in_an_exception(trained, count):
    broken = SecondReading(Batches(count, broken=True))
    trained.fails(Batches(2), steps=2, validation_data=broken)


@pytest.mark.parametrize(
    ("steps", "error"), [(0, FailureError), (2, FailureError), (1, SystemExit)]
)
def test_a_reward_that_raises(trained, steps, error):
    trained.verifier.calls_until_broken = steps
    trained.verifier.error = error
    trained.fails(Batches(4), steps=steps, error=error)


@pytest.mark.parametrize(
    ("moment", "steps"),
    [
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        ("on_train_batch_begin", 0),
        ("on_train_batch_end", 1),
        ("on_epoch_end", 2),
        ("on_train_end", 2),
    ],
)
def test_a_callback_that_raises(trained, moment, steps):
    trained.fails(Batches(2), [callback(moment)], steps)


def test_training_on_single_batches(trained):
    trained.verifier.calls_until_broken = 0
    before = state(trained.model)
    with pytest.raises(FailureError, match="brok"):
        trained.model.train_on_batch(documents(2, LENGTH))
    assert same(before, state(trained.model))
    trained.goes_on()


@pytest.mark.parametrize("source", ["data", "reward", "on_test_batch_end"])
def test_evaluation(trained, source):
    before = state(trained.model)
    x = Batches(2)
    callbacks = []
    if source == "data":
        x = SecondReading(Batches(0, broken=True))
    elif source == "reward":
        trained.verifier.calls_until_broken = 1
    else:
        callbacks = [callback(source)]
    with pytest.raises(FailureError, match="brok"):
        trained.model.evaluate(x, callbacks=callbacks, verbose=0)
    assert same(before, state(trained.model))
    trained.goes_on()


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per call on PyTorch")
def test_data_that_fail_in_the_middle_of_a_call():
    """Of two steps: it ends after the first."""
    model = spoiled(100, 100, steps_per_execution=2)
    expected = spoiled(100, 100)
    expected.fit(Batches(3), verbose=0)
    with pytest.raises(FailureError, match="brok"):
        model.fit(Batches(3, broken=True), verbose=0)
    for one, other in zip(state(model), state(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per call on PyTorch")
def test_a_reward_that_raises_in_a_call_of_two_steps(trained):
    """The second of them has no update either."""
    trained.compile(steps_per_execution=2)
    trained.verifier.calls_until_broken = 2
    trained.fails(Batches(4), steps=1)
    trained.compile()


def test_an_update_that_is_not_finite_is_skipped_and_counted(caplog):
    model = spoiled(1, 3)
    snapshots = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: snapshots.append(weights(model))
    )
    history = model.fit(Batches(5), callbacks=[keep], verbose=0).history
    assert history["skipped_updates"] == [2]
    assert same(snapshots[0], snapshots[1])
    assert same(snapshots[0], snapshots[2])
    assert not same(snapshots[2], snapshots[3])
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(history["ce_loss"]).all()
    assert caplog.text.count("was not finite and was skipped") == 1
    # Other numbers of an epoch are means of the steps that had an update.
    assert model.fit(Batches(1), verbose=0).history["skipped_updates"] == [0]


def test_small_and_large_weights_are_updated_alike(monkeypatch):
    after = []
    for small in (100, updates.SMALL):
        monkeypatch.setattr(updates, "SMALL", small)
        model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=5)
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0))
        start = [to_numpy(weight) for weight in model.trainable_variables]
        model.train_on_batch(documents(2, LENGTH))
        after.append(weights(model))
    sizes = {weight.size for weight in start}
    assert min(sizes) <= 100 < max(sizes)
    assert not same(start, after[0])
    for found in after[1:]:
        for one, other in zip(found, after[0], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-7)


def test_updates_that_loss_scaling_skips_are_counted():
    model = spoiled(1, 2)
    adam = keras.optimizers.Adam(0.01)
    model.compile(keras.optimizers.LossScaleOptimizer(adam, initial_scale=8.0))
    history = model.fit(Batches(3), verbose=0).history
    assert history["skipped_updates"] == [1]
    assert np.isfinite(history["loss"]).all()
    assert float(to_numpy(model.optimizer.dynamic_scale)) == 4.0
    assert int(to_numpy(adam.iterations)) == 2


def test_training_ends_after_too_many_in_a_row():
    model = spoiled(1, 5, max_skipped_updates=2)
    snapshots = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: snapshots.append(weights(model))
    )
    with pytest.raises(FloatingPointError, match=r"at most 2 .*3.*learning rate"):
        model.fit(Batches(9), callbacks=[keep], verbose=0)
    assert same(weights(model), snapshots[-1])
    # Steps 4 and 5 alone are left.
    history = model.fit(Batches(4), verbose=0).history
    assert history["skipped_updates"] == [1]


@pytest.mark.parametrize("small", (1, updates.SMALL), ids=("large", "small"))
def test_steps_whose_gradient_is_finite_and_whose_update_is_not(monkeypatch, small):
    # What large weights become is computed twice, where there is an update.
    monkeypatch.setattr(updates, "SMALL", small)
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=5)
    # Ids that no document has give 0 / 0.
    model.compile(keras.optimizers.Adam(0.01, epsilon=0.0))
    before = [to_numpy(weight) for weight in model.trainable_variables]
    logs = model.train_on_batch(documents(2, LENGTH), return_dict=True)
    assert logs["skipped_updates"] == 1
    assert same(before, [to_numpy(weight) for weight in model.trainable_variables])
    model.compile(keras.optimizers.SGD(1e38))
    for _ in range(3):
        model.train_on_batch(documents(2, LENGTH))
    assert all(np.isfinite(value).all() for value in weights(model))


@pytest.mark.on_torch
def test_an_interruption_between_two_weights():
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=5)
    model.compile(Interrupted(0.1))
    model.optimizer.build(model.trainable_variables)
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        model.train_on_batch(documents(2, LENGTH))
    assert same(before, weights(model))


class Interrupted(keras.optimizers.Optimizer):
    """Assigns one weight and is interrupted."""

    def update_step(self, gradient, variable, learning_rate):
        variable.assign(gradient)
        raise KeyboardInterrupt


@pytest.mark.on_torch
@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")
def test_the_number_of_skipped_updates_is_checked_and_saved(tmp_path):
    model = spoiled(0, 0, max_skipped_updates=None)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["max_skipped_updates"] is None
    with pytest.raises(ValueError, match="max_skipped_updates"):
        model.compile(max_skipped_updates=-1)
    with pytest.raises(TypeError, match="max_skipped_updates"):
        model.compile(max_skipped_updates=0.5)
