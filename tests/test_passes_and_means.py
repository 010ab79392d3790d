"""Every document once in a pass, and every measure a mean over all of them."""

import keras
import numpy as np
import pytest
from helpers import documents, flat, llama, to_numpy

import keras_ebft

LENGTH = 12
BACKEND = keras.backend.backend()
# What Keras says of every stream.
pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")


def sft(seed=0, rate=0.0, **options):
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=seed)
    model.compile(keras.optimizers.SGD(rate), **options)
    return model


@pytest.fixture(scope="module")
def model():
    return sft()


class Interruption(keras.callbacks.Callback):
    """Ends a run after some batches."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


ROWS = np.tile(np.arange(6)[:, None], (1, LENGTH)).astype("int32")


class Noting(keras.utils.PyDataset):
    """Six documents, one to a batch, whose order is that of `RowBatches`."""

    def __init__(self):
        super().__init__()
        rows = {"token_ids": ROWS, "padding_mask": np.ones(ROWS.shape, bool)}
        report = keras_ebft.data.PackingReport(LENGTH)
        packed = keras_ebft.data.PackedRows(rows, report)
        self.rows = packed.py_dataset(1, seed=3)
        self.read = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        batch = self.rows[index]
        self.read.append(int(batch["token_ids"][0, 0]))
        return batch

    def begin_epoch(self, number):
        self.rows.begin_epoch(number)


def test_a_pass_shows_every_document_once_whatever_an_epoch_is(model):
    data = Noting()
    epochs = []
    counter = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: epochs.append(batch)
    )
    model.fit(data, steps_per_epoch=4, epochs=3, verbose=0, callbacks=[counter])
    assert epochs == [0, 1, 2, 3] * 3
    # The first batch is read once more before training, for its shape; some
    # backends read ahead.
    first, second = data.read[1:7], data.read[7:13]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    # Nor is an order seen again by the next `fit`.
    data.read.clear()
    model.fit(data, steps_per_epoch=6, epochs=1, verbose=0)
    assert data.read[1:7] not in (first, second)
    assert sorted(data.read[1:7]) == list(range(6))


def test_validation_on_the_data_of_training_changes_no_order():
    """In the middle of a pass, by `fit` and by a callback."""

    def run(is_measured):
        model, data = sft(rate=0.5), Noting()

        def measure(batch, logs):
            if is_measured and batch == 1:
                model.evaluate(data, verbose=0)

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=measure)
        options = {"steps_per_epoch": 4, "epochs": 3, "verbose": 0}
        if is_measured:
            options["validation_data"] = data
        model.fit(data, **options, callbacks=[callback])
        return flat(model.causal_lm.get_weights())

    np.testing.assert_array_equal(run(True), run(False))


@pytest.mark.on_torch
def test_two_fits_see_two_orders(model):
    data = Noting()
    orders = []
    for _ in range(3):
        data.read.clear()
        model.fit(data, verbose=0)
        orders.append(tuple(data.read[1:]))
    assert len(set(orders)) == 3


def tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(ROWS).batch(1)


def data_loader():
    import torch

    return torch.utils.data.DataLoader(ROWS, batch_size=1)


SOURCES = {
    "documents": lambda: ROWS,
    "py_dataset": Noting,
    "stream": lambda: keras_ebft.data.pack(list(ROWS), None, LENGTH).batches(1),
    "tf_data": tf_data,
    "data_loader": data_loader,
}


def interrupted(source, steps, calls, path, **options):
    """`(interrupted and resumed, uninterrupted)`: weights after two or three epochs.

    Args:
        source: name in `SOURCES`.
        steps: steps per epoch or `None`.
        calls: of the train function, after which training is interrupted.
        path: folder.
        **options: for `compile`.
    """
    size = {"batch_size": 1} if source == "documents" else {}
    size |= {"steps_per_epoch": steps, "epochs": 3 if steps else 2, "verbose": 0}

    def run(*callbacks):
        model = sft(rate=0.5, **options)
        model.fit(SOURCES[source](), **size, callbacks=list(callbacks))
        return flat(model.causal_lm.get_weights())

    def checkpoint():
        path_of_run = path / "run.weights.h5"
        return keras_ebft.TrainingCheckpoint(path_of_run, save_freq=2)

    whole = run()
    with pytest.raises(InterruptedError):
        run(checkpoint(), Interruption(calls))
    return run(checkpoint()), whole


@pytest.mark.on_torch
@pytest.mark.parametrize(
    ("source", "steps"),
    [
        ("documents", None),
        ("documents", 9),
        ("py_dataset", None),
        ("py_dataset", 4),
        ("stream", None),
        ("stream", 4),
        ("tf_data", None),
        ("data_loader", None),
    ],
)
def test_resumed_training_sees_what_it_would_have_seen(source, steps, tmp_path):
    # After a file that was written in the middle of an epoch and of a pass.
    resumed, whole = interrupted(source, steps, 7 if steps else 9, tmp_path)
    np.testing.assert_array_equal(resumed, whole)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per call there")
@pytest.mark.parametrize(
    ("source", "steps", "each", "calls"),
    [
        # An epoch is of two calls, four batches.
        ("py_dataset", 3, 2, 3),
        # An epoch ends in the middle of its only call.
        ("documents", None, 8, 2),
    ],
)
def test_so_it_does_with_several_steps_per_call(source, steps, each, calls, tmp_path):
    found = interrupted(source, steps, calls, tmp_path, steps_per_execution=each)
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per call there")
def test_a_place_between_calls_is_refused(tmp_path):
    path = tmp_path / "run.weights.h5"
    options = {"batch_size": 1, "epochs": 3, "verbose": 0}
    with pytest.raises(InterruptedError):
        callbacks = [keras_ebft.TrainingCheckpoint(path, save_freq=3), Interruption(4)]
        sft().fit(ROWS, **options, callbacks=callbacks)
    callbacks = [keras_ebft.TrainingCheckpoint(path)]
    model = sft(steps_per_execution=2)
    with pytest.raises(ValueError, match=r"calls of 2 steps.*after batch 3"):
        model.fit(ROWS, **options, callbacks=callbacks)


def test_data_that_end_while_they_are_passed_over(tmp_path):
    """The model holds what the file held, and goes on."""
    path = tmp_path / "run.weights.h5"
    with pytest.raises(InterruptedError):
        callbacks = [keras_ebft.TrainingCheckpoint(path, save_freq=3), Interruption(4)]
        sft(rate=0.5).fit(Breaking(6), verbose=0, callbacks=callbacks)
    model, held = sft(rate=0.5), []
    read = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: held.append(flat(model.causal_lm.get_weights()))
    )
    callbacks = [keras_ebft.TrainingCheckpoint(path), read]
    with pytest.raises(InterruptedError, match="broken"):
        model.fit(Breaking(0), verbose=0, callbacks=callbacks)
    np.testing.assert_array_equal(flat(model.causal_lm.get_weights()), held[0])
    model.fit(ROWS, verbose=0)


class Breaking:
    """Six batches of one document, of which some can be read more than once."""

    def __init__(self, count):
        self.count, self.was_read = count, False

    def __len__(self):
        return len(ROWS)

    def __iter__(self):
        count = self.count if self.was_read else len(ROWS)
        self.was_read = True
        yield from ROWS[:count, None]
        if count < len(ROWS):
            raise InterruptedError("broken")


def uneven(count=5):
    """Documents of unequal length as rows, most with an answer."""
    lengths = np.array([12, 7, 9, 12, 8])[:count]
    prompts = np.array([5, 3, 0, 7, 2])[:count]
    places = np.arange(LENGTH)
    mask = places < lengths[:, None]
    return {
        "token_ids": documents(count, LENGTH) * mask,
        "padding_mask": mask,
        "answer_mask": mask & (places >= prompts[:, None]),
    }


def test_the_loss_is_a_mean_over_all_tokens():
    """A last batch of one document is no whole one."""
    model = sft()
    rows = uneven()
    scores = keras_ebft.evaluation.cross_entropy(model, rows)
    expected = scores["answer_cross_entropy"]
    measured = model.evaluate(rows, batch_size=2, return_dict=True, verbose=0)
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["ce_loss"] == pytest.approx(expected, rel=1e-5)
    history = model.fit(rows, batch_size=2, validation_data=rows, verbose=0).history
    for name in ("loss", "val_loss", "ce_loss", "val_ce_loss"):
        assert history[name][0] == pytest.approx(expected, rel=1e-5), name
    listed = model.evaluate(rows, batch_size=2, verbose=0)
    assert listed == [measured[name] for name in ("loss", "ce_loss", "perplexity")]


@pytest.fixture(scope="module")
def greedy():
    """A model whose rollouts depend on the documents alone."""
    sampler = keras_ebft.BlockSampler(
        rollout_length=2,
        stride=3,
        context_length=3,
        num_samples=2,
        temperature=0.0,
        stop_token_ids=tuple(range(0, 31, 4)),
    )
    model = keras_ebft.EBFTModel(
        llama(num_layers=1),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1,)),
        ce_weight=0.5,
        kl_weight=0.1,
        entropy_weight=0.2,
        critic=keras_ebft.Critic(),
        seed=0,
    )
    # Away from where the reference is, so that the divergence is not 0.
    model.causal_lm.set_weights([w * 1.2 for w in model.causal_lm.get_weights()])
    model.compile(keras.optimizers.SGD(0.0))
    return model


@pytest.mark.on_torch
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_measure_is_the_same_whatever_the_batches_are(greedy, batch_size):
    rows = uneven()
    expected = greedy.evaluate(rows, batch_size=5, return_dict=True, verbose=0)
    assert 0 < expected["ended_fraction"] < 1
    assert expected["whitened_feature_matching_loss"] > 0.1
    order = np.random.default_rng(0).permutation(5)
    shuffled = {name: values[order] for name, values in rows.items()}
    wider = {name: np.pad(v, ((0, 0), (0, 3))) for name, v in rows.items()}
    for x in (rows, shuffled, wider):
        options = {"batch_size": batch_size, "return_dict": True, "verbose": 0}
        found = greedy.evaluate(x, **options)
        if x is wider:
            # More padding, more places without a block.
            assert found.pop("live_block_fraction") < expected["live_block_fraction"]
        for name in found:
            value = expected[name]
            assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    # The loss is what its terms say.
    terms = {"policy_loss": 1.0, "ce_loss": 0.5, "kl": 0.1, "entropy": -0.2}
    loss = sum(weight * expected[name] for name, weight in terms.items())
    loss += expected["critic_loss"]
    assert expected["loss"] == pytest.approx(loss, rel=1e-4)


PLACES = (3, 6, 9)


def packed(*rows_of_documents):
    """Some of `uneven`'s documents in each row, with anchors at `PLACES` of each."""
    alone, length = uneven(), 2 * LENGTH
    names = ("token_ids", "padding_mask", "segment_ids", "answer_mask")
    rows = {name: np.zeros((len(rows_of_documents), length), "int32") for name in names}
    anchors = np.full((len(rows_of_documents), 2 * len(PLACES)), -1)
    for row, chosen in enumerate(rows_of_documents):
        start, found = 0, []
        for segment, document in enumerate(chosen, start=1):
            size = int(alone["padding_mask"][document].sum())
            window = slice(start, start + size)
            rows["token_ids"][row, window] = alone["token_ids"][document, :size]
            rows["padding_mask"][row, window] = 1
            rows["answer_mask"][row, window] = alone["answer_mask"][document, :size]
            rows["segment_ids"][row, window] = segment
            # Where two tokens of the document follow.
            found += [start + place for place in PLACES if place + 2 <= size]
            start += size
        anchors[row, : len(found)] = found
    return {**rows, "anchors": anchors}


@pytest.mark.on_torch
def test_every_measure_is_the_same_however_documents_are_packed(greedy):
    """With anchors at the same places of the documents."""
    options = {"return_dict": True, "verbose": 0}
    apart = packed(*[[document] for document in range(5)])
    expected = greedy.evaluate(apart, batch_size=5, **options)
    assert expected["kl"] > 1e-3
    assert 0 < expected["ended_fraction"] < 1
    assert expected["whitened_feature_matching_loss"] > 0.1
    # It says of rows how full they are.
    assert expected.pop("live_block_fraction") < 1
    for rows in ([[0, 1], [2, 3], [4]], [[4, 2], [1], [3, 0]]):
        found = greedy.evaluate(packed(*rows), batch_size=2, **options)
        assert set(found) == {*expected, "live_block_fraction"}
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.mark.on_torch
def test_nothing_measured_is_no_score(greedy):
    """A stream of documents without a block, which is known only when it is read."""
    rows = uneven(2)
    rows["padding_mask"][:, 1:] = False
    rows["answer_mask"][:] = False
    measured = greedy.evaluate(iter([rows]), return_dict=True, verbose=0)
    assert measured.pop("live_block_fraction") == 0.0
    assert measured
    assert np.isnan(list(measured.values())).all(), measured


@pytest.mark.on_torch
def test_what_callbacks_watch(greedy, model):
    rows = uneven(2)
    Stopping = keras.callbacks.EarlyStopping
    for callback in (
        Stopping("val_loss"),
        Stopping("loss", mode="min"),
        keras.callbacks.ReduceLROnPlateau("val_loss"),
        keras.callbacks.ModelCheckpoint("x.keras", "val_loss", save_best_only=True),
    ):
        with pytest.raises(ValueError, match=r'noise.*"val_feature_matching_loss"'):
            greedy.fit(rows, callbacks=[callback], verbose=0)
    for several in ([[callback]], keras.callbacks.CallbackList([callback])):
        with pytest.raises(ValueError, match="noise"):
            greedy.fit(rows, callbacks=several, verbose=0)
    with pytest.raises(ValueError, match="neither better nor worse"):
        greedy.fit(rows, callbacks=Stopping("val_entropy"), verbose=0)
    for name, mode in (("feature_matching_loss", "min"), ("alignment", "max")):
        callback = Stopping(f"val_{name}")
        greedy.fit(rows, validation_data=rows, callbacks=[callback], verbose=0)
        better = 0.0 if mode == "min" else 9.0
        assert bool(callback.monitor_op(better, 1.0)), name
    # The cross-entropy is no noise.
    model.fit(rows, validation_data=rows, callbacks=[Stopping("val_loss")], verbose=0)
    assert to_numpy(model.optimizer.iterations) > 0
