"""Every document once in a pass, and every measure a mean over all of them."""

import keras
import numpy as np
import pytest
from helpers import documents, flat, llama, to_numpy

import keras_ebft

LENGTH = 12
# What Keras says of every stream.
pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")


def sft(seed=0, rate=0.0):
    model = keras_ebft.EBFTModel.sft(llama(num_layers=1), seed=seed)
    model.compile(keras.optimizers.SGD(rate))
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


@pytest.mark.on_torch
def test_two_fits_see_two_orders(model):
    data = Noting()
    orders = []
    for _ in range(3):
        data.read.clear()
        model.fit(data, verbose=0)
        orders.append(tuple(data.read[1:]))
    assert len(set(orders)) == 3


SOURCES = {
    "documents": lambda: ROWS,
    "py_dataset": Noting,
    "stream": lambda: keras_ebft.data.pack(list(ROWS), None, LENGTH).batches(1),
}


@pytest.mark.on_torch
@pytest.mark.parametrize(
    ("source", "steps"),
    [
        ("documents", None),
        ("documents", 9),
        ("py_dataset", None),
        ("py_dataset", 4),
        ("stream", 4),
    ],
)
def test_resumed_training_sees_what_it_would_have_seen(source, steps, tmp_path):
    size = {"batch_size": 1} if source == "documents" else {}
    options = {"steps_per_epoch": steps, "epochs": 3, "verbose": 0, **size}

    def run(model, *callbacks):
        model.fit(SOURCES[source](), **options, callbacks=list(callbacks))
        return flat(model.causal_lm.get_weights())

    def checkpoint(name):
        path = tmp_path / f"{name}.weights.h5"
        return keras_ebft.TrainingCheckpoint(path, save_freq=2)

    whole = run(sft(rate=0.5))
    with pytest.raises(InterruptedError):
        run(sft(rate=0.5), checkpoint("run"), Interruption(7))
    np.testing.assert_array_equal(run(sft(rate=0.5), checkpoint("run")), whole)


def uneven(count=5):
    """Documents of unequal length as rows."""
    lengths = np.array([12, 7, 9, 12, 8])[:count]
    mask = np.arange(LENGTH) < lengths[:, None]
    return {"token_ids": documents(count, LENGTH) * mask, "padding_mask": mask}


def test_the_loss_is_a_mean_over_all_tokens():
    """A last batch of one document is no whole one."""
    model = sft()
    rows = uneven()
    expected = keras_ebft.evaluation.cross_entropy(model, rows)["cross_entropy"]
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
        rollout_length=2, stride=3, context_length=3, num_samples=2, temperature=0.0
    )
    model = keras_ebft.EBFTModel(
        llama(num_layers=1),
        sampler,
        keras_ebft.FeatureNetwork(layers=(1,)),
        keras_ebft.FeatureMatchingReward(whitening=None),
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
    names = ("token_ids", "padding_mask", "segment_ids")
    rows = {name: np.zeros((len(rows_of_documents), length), "int32") for name in names}
    anchors = np.full((len(rows_of_documents), 2 * len(PLACES)), -1)
    for row, chosen in enumerate(rows_of_documents):
        start, found = 0, []
        for segment, document in enumerate(chosen, start=1):
            size = int(alone["padding_mask"][document].sum())
            window = slice(start, start + size)
            rows["token_ids"][row, window] = alone["token_ids"][document, :size]
            rows["padding_mask"][row, window] = 1
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
