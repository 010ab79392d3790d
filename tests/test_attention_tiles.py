"""Attention in tiles against its plain definition, forward and backward."""

import gc
import weakref

import keras
import numpy as np
import pytest
from helpers import flat, gradients, to_numpy
from keras import Variable, ops

from keras_ebft.kernels import attention_tiles
from keras_ebft.kernels.causal_attention import blockwise as causal
from keras_ebft.kernels.causal_attention.reference import causal_attention_reference
from keras_ebft.kernels.strided_attention import blockwise as strided
from keras_ebft.kernels.strided_attention.reference import strided_attention_reference

RANDOM = np.random.default_rng(0)
OPTIONS = [
    {},
    {"sliding_window": 5},
    {"sliding_window": 9, "soft_cap": 1.5},
]
ANCHORS = ("known", "tensor", "packed", "known packed")


def normal(*shape):
    return RANDOM.normal(size=shape).astype("float32")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "KEY_TILE", 7)
    monkeypatch.setattr(attention_tiles, "LARGE_KEY_TILE", 8)
    monkeypatch.setattr(causal, "QUERY_TILE", 6)
    monkeypatch.setattr(strided, "FEWEST_QUERIES", 1)
    monkeypatch.setattr(strided, "TILES", 3)


def tiled_attentions(options):
    """The functions that share tiles of blocks: one more on PyTorch, without cap."""
    functions = [strided.strided_attention_blockwise]
    if keras.backend.backend() == "torch" and "soft_cap" not in options:
        from keras_ebft.kernels.strided_attention import torch_fused

        functions.append(torch_fused.strided_attention_fused)
    return functions


def compare(function, reference, variables, **options):
    """Outputs and gradients of two functions of the same variables."""
    tensors = [variable.value for variable in variables]
    found = to_numpy(function(*tensors, **options))
    expected = to_numpy(reference(*tensors, **options))
    np.testing.assert_allclose(found, expected, atol=3e-6)
    weight = ops.convert_to_tensor(normal(*found.shape))

    def gradients_of(attention):
        def weighted():
            values = [variable.value for variable in variables]
            return ops.sum(attention(*values, **options) * weight)

        return gradients(weighted, variables)

    ours, theirs = gradients_of(function), gradients_of(reference)
    for one, two in zip(ours, theirs):
        size = np.linalg.norm(flat([two]))
        assert size > 0.1
        assert np.linalg.norm(flat([one]) - flat([two])) < 1e-5 * size


@pytest.mark.parametrize(
    ("length", "packed", "options"),
    [
        (1, False, {}),
        (6, True, OPTIONS[2]),
        *((31, packed, options) for packed in (False, True) for options in OPTIONS),
    ],
)
def test_causal(length, packed, options):
    if packed:
        documents = np.array([[0, 0, 3, 3, 9], [0, 1, 1, 14, 14]], dtype="int32")
        starts = np.repeat(documents, 7, axis=1)[:, :length]
        starts = np.minimum(starts, np.arange(length, dtype="int32"))
        options = {
            **options,
            "starts": ops.convert_to_tensor(starts),
        }
    variables = [Variable(normal(2, length, heads, 4)) for heads in (4, 2, 2)]
    if length == 1:
        # One key has all the weight: nothing moves by queries and keys.
        values = [variable.value for variable in variables]
        output = causal.causal_attention_blockwise(*values, scale=0.6, **options)
        expected = np.repeat(to_numpy(values[2]), 2, axis=2)
        np.testing.assert_allclose(to_numpy(output), expected, atol=1e-6)
        return
    compare(
        causal.causal_attention_blockwise,
        causal_attention_reference,
        variables,
        scale=0.6,
        **options,
    )


@pytest.mark.parametrize(
    ("blocks", "anchors", "options"),
    [
        (1, "packed", OPTIONS[1]),
        *((5, anchors, OPTIONS[2]) for anchors in ANCHORS),
        *((5, anchors, OPTIONS[1]) for anchors in ANCHORS),
        (5, "known", {}),
    ],
)
def test_strided(blocks, anchors, options):
    known = np.array([2, 9, 10, 17, 23], dtype="int32")[:blocks]
    per_row = np.stack([known, np.array([20, 3, 1, 8, 14])[:blocks]]).astype("int32")
    options = dict(options)
    options["anchors"] = known if "known" in anchors else ops.convert_to_tensor(per_row)
    if "packed" in anchors:
        rows = np.stack([known, known]) if "known" in anchors else per_row
        starts = (rows * np.array([[0.5], [0.9]])).astype("int32")
        options["starts"] = ops.convert_to_tensor(starts)
    own = [Variable(normal(2, 3, blocks, 4, heads, 4)) for heads in (4, 2, 2)]
    document = [Variable(normal(2, 25, 2, 4)) for _ in range(2)]
    for attention in tiled_attentions(options):
        compare(
            attention,
            strided_attention_reference,
            [*own, *document],
            scale=0.6,
            **options,
        )


@pytest.mark.parametrize("step", [0, 2])
def test_one_query_of_a_longer_block(step):
    anchors = np.array([1, 8, 22], dtype="int32")
    query = ops.convert_to_tensor(normal(1, 2, 3, 1, 4, 4))
    own = [ops.convert_to_tensor(normal(1, 2, 3, 5, 2, 4)) for _ in range(2)]
    document = [ops.convert_to_tensor(normal(1, 25, 2, 4)) for _ in range(2)]
    arguments = (query, *own, *document, anchors)
    options = {"scale": 0.6, "query_offset": step, "sliding_window": 4}
    for attention in tiled_attentions(options):
        np.testing.assert_allclose(
            to_numpy(attention(*arguments, **options)),
            to_numpy(strided_attention_reference(*arguments, **options)),
            atol=2e-6,
        )


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="elsewhere compilers decide"
)
def test_tensors_are_freed_without_the_garbage_collector():
    """A step's tensors in reference cycles would pile up from step to step."""
    anchors = np.array([1, 8, 22], dtype="int32")
    gc.collect()
    gc.disable()
    try:
        for attention in tiled_attentions({}):
            shapes = [(1, 2, 3, 5, heads, 4) for heads in (4, 2, 2)]
            shapes += [(1, 25, 2, 4)] * 2
            tensors = [ops.convert_to_tensor(normal(*shape)) for shape in shapes]
            tensors = [tensor.requires_grad_() for tensor in tensors]
            alive = [weakref.ref(tensor) for tensor in tensors]
            output = attention(*tensors, anchors, scale=0.6)
            alive.append(weakref.ref(output))
            output.sum().backward()
            del tensors, output
            assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="PyTorch's own fused attention"
)
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        # Seen by all: 2 to 6; a query each begins later and ends earlier.
        ([0, 2], [9, 6], [(0, 2, True), (2, 6, False), (6, 9, True)]),
        ([0, 0], [5, 9], [(0, 5, False), (5, 9, True)]),
        ([0, 0], [9, 9], [(0, 9, False)]),
        # Three keys are too few for a call of their own, as is none at all.
        ([0, 2], [9, 5], [(0, 9, True)]),
        ([0, 5], [4, 9], [(0, 9, True)]),
        ([0, 0], [0, 0], []),
    ],
)
def test_keys_that_every_query_sees_are_met_without_a_mask(
    monkeypatch, low, high, expected
):
    import torch

    from keras_ebft.kernels import torch_fused_attention

    monkeypatch.setattr(torch_fused_attention, "FEWEST_OPEN_KEYS", 4)
    low, high = (torch.tensor([[places]]) for places in (low, high))
    ranges = attention_tiles.Ranges(low, high, (0,), (int(high.max()),))
    spans = torch_fused_attention.Spans(ranges).of(0, torch.float32)
    assert [
        (span.keys.start, span.keys.stop, span.mask is not None) for span in spans
    ] == expected
    for span in spans:
        if span.mask is not None:
            for query, row in enumerate(span.mask[0, 0] == 0):
                seen = [low[0, 0, query] <= k < high[0, 0, query] for k in range(9)]
                assert row.tolist() == seen[span.keys]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of PyTorch")
class TestKnownSpans:
    """What is seen is looked up once, and anew for all that it follows from."""

    @staticmethod
    def spans_of(known, anchors, starts=None, blocks=5, window=None, offset=0):
        layout = strided.TileLayout((1, 2, blocks, 1, 4, 8), 2)
        return known(layout, anchors, starts, window, offset)

    @pytest.fixture
    def known(self):
        from keras_ebft.kernels.strided_attention import torch_fused

        return torch_fused.KnownSpans()

    def test_the_same_places_are_the_same_spans(self, known):
        import torch

        anchors, tensor = np.arange(5, dtype="int32"), torch.arange(5)[None]
        first = self.spans_of(known, anchors)
        assert self.spans_of(known, anchors.copy()) is first
        assert self.spans_of(known, anchors, offset=1) is first
        second = self.spans_of(known, anchors, tensor)
        assert second is not first
        assert self.spans_of(known, anchors, tensor) is second
        in_window = self.spans_of(known, anchors, window=3, offset=1)
        assert in_window is not first
        assert self.spans_of(known, anchors, window=3, offset=1) is in_window
        assert self.spans_of(known, anchors, window=3, offset=2) is not in_window
        assert self.spans_of(known, anchors, window=2, offset=1) is not in_window

    def test_what_was_written_to_is_looked_up_again(self, known):
        import torch

        anchors, tensor = np.arange(5, dtype="int32"), torch.arange(5)[None]
        of_array, of_tensor = (self.spans_of(known, a) for a in (anchors, tensor))
        anchors[:] += 3
        tensor += 3
        for places, before in ((anchors, of_array), (tensor, of_tensor)):
            found = self.spans_of(known, places)
            assert found is not before
            assert int(found.high.max()) == 7

    def test_nothing_is_known_of_tensors_that_may_have_been_written_to(self, known):
        import torch

        with torch.inference_mode():
            places = torch.arange(5)[None]
            assert int(self.spans_of(known, places).high.max()) == 4
            places += 3
            assert int(self.spans_of(known, places).high.max()) == 7

    def test_what_has_no_values_is_not_known_where_there_are_some(self, known):
        import torch
        from torch._subclasses import FakeTensorMode

        anchors = np.arange(5, dtype="int32")
        with FakeTensorMode():
            self.spans_of(known, anchors)
        assert not known._found
        with torch.inference_mode():
            first = self.spans_of(known, anchors)
            masks = first.of(0, torch.float32)
        # What was made in inference mode serves training, too.
        assert self.spans_of(known, anchors) is first
        assert first.of(0, torch.float32) is masks

    def test_tensors_are_forgotten_with_their_address(self, known):
        import torch

        for last in (4, 7):
            places = torch.linspace(0, last, 5).to(torch.int32)[None]
            assert int(self.spans_of(known, places).high.max()) == last
            del places
            assert not known._found

    def test_few_are_held_and_large_masks_not(self, known, monkeypatch):
        import torch

        from keras_ebft.kernels import torch_fused_attention
        from keras_ebft.kernels.strided_attention import torch_fused

        for place in range(9):
            self.spans_of(known, np.arange(place, place + 5, dtype="int32"))
        assert len(known._found) == torch_fused.MOST_KNOWN
        spans = self.spans_of(known, np.arange(5, 10, dtype="int32"))
        assert spans.of(0, torch.float32) is spans.of(0, torch.float32)
        held = spans._numbers_kept
        assert held == sum(span.mask.numel() for span in spans.of(0, torch.float32))
        monkeypatch.setattr(torch_fused_attention, "MOST_NUMBERS_KEPT", held)
        assert spans.of(1, torch.float32) is not spans.of(1, torch.float32)
