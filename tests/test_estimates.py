"""What is estimated of a step, against what one takes."""

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

import keras_ebft
from keras_ebft.estimates import SHAPES, DecoderShape, memory, work

ON_TORCH = keras.backend.backend() == "torch"
# None of the sizes that the coefficients were taken from.
SHAPE = DecoderShape(3, 80, 208, 5, 1, 16, 97, tied=False)
SAMPLER = keras_ebft.BlockSampler(rollout_length=5, stride=7, num_samples=4)
DOCUMENTS = {"length": 40, "batch_size": 1, "sampler": SAMPLER}


def build(shape, dtype="float32", lora_rank=None, **options):
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=shape.vocabulary_size,
        num_layers=shape.num_layers,
        num_query_heads=shape.num_query_heads,
        num_key_value_heads=shape.num_key_value_heads,
        hidden_dim=shape.hidden_dim,
        intermediate_dim=shape.intermediate_dim,
        tie_word_embeddings=shape.tied,
        dtype=dtype,
    )
    causal_lm = keras_hub.models.LlamaCausalLM(backbone)
    if lora_rank:
        backbone.enable_lora(lora_rank)
    return keras_ebft.EBFTModel(causal_lm, SAMPLER, seed=0, **options)


def texts():
    random = np.random.default_rng(0)
    return random.integers(0, SHAPE.vocabulary_size, (1, 40)).astype("int32")


def size(variables):
    """Bytes of variables, each counted once."""
    widths = {"float32": 4, "bfloat16": 2, "int32": 4, "int64": 8}
    found = {id(v): v for v in variables}.values()
    return sum(int(np.prod(v.shape)) * widths[str(v.dtype)] for v in found)


@pytest.mark.parametrize(
    ("dtype", "lora_rank"),
    [("float32", None), ("float32", 3), ("bfloat16", 3), ("mixed_bfloat16", None)],
)
def test_variables_have_the_bytes_that_are_estimated(dtype, lora_rank):
    model = build(SHAPE, dtype, lora_rank)
    estimate = memory(SHAPE, dtype=dtype, lora_rank=lora_rank, **DOCUMENTS)
    own = {id(v) for v in model.causal_lm.variables}
    frozen = [v for m in model.frozen_networks for v in m.variables]
    trained = model.causal_lm.trainable_variables
    # Norms stay in float32 where weights are bfloat16.
    spare = 2 * 2 * (2 * SHAPE.num_layers + 1) * SHAPE.hidden_dim
    assert estimate.policy == pytest.approx(size(model.causal_lm.variables), abs=spare)
    copy = size(v for v in frozen if id(v) not in own)
    assert estimate.frozen == pytest.approx(copy, abs=spare)
    assert estimate.gradients == pytest.approx(size(trained), abs=spare)
    if dtype == "float32":
        assert estimate.policy == size(model.causal_lm.variables)
        assert estimate.frozen == copy
        assert estimate.gradients == size(trained)


def test_the_optimizer_has_the_bytes_that_are_estimated():
    model = build(SHAPE, "bfloat16")
    optimizer = keras.optimizers.AdamW(1e-6)
    optimizer.build(model.causal_lm.trainable_variables)
    estimate = memory(SHAPE, dtype="bfloat16", **DOCUMENTS)
    found = size(optimizer.variables)
    assert estimate.optimizer == pytest.approx(found, rel=0.01)


KEPT_CASES = {
    "plain": {},
    "adapters in half": {"dtype": "bfloat16", "lora_rank": 3},
}


@pytest.mark.skipif(not ON_TORCH, reason="PyTorch tells what it keeps")
@pytest.mark.parametrize("case", KEPT_CASES)
def test_what_is_kept_for_the_gradient(case):
    import torch

    options = {"dtype": "float32", **KEPT_CASES[case]}
    model = build(SHAPE, **options)
    rollouts = model.rollout(texts(), seed=0)
    weights = {storage_of(v.value) for v in model.causal_lm.variables}
    kept = {}

    def note(tensor):
        kept[storage_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = model.score(texts(), rollouts)
    found = sum(
        tensor.untyped_storage().nbytes()
        for storage, tensor in kept.items()
        if storage not in weights
    )
    del scores
    estimate = memory(SHAPE, **options, **DOCUMENTS)
    assert estimate.activations == pytest.approx(found, rel=0.08)


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


def test_settings_that_save_memory_save_it():
    plain = memory(SHAPES["1B"])
    assert memory(SHAPES["1B"], rematerialize=True).activations < plain.activations / 5
    groups = memory(SHAPES["1B"], micro_batches=4).activations
    assert plain.activations / 4 < groups < plain.activations / 2
    adapters = memory(SHAPES["1B"], lora_rank=16)
    assert adapters.frozen == 0
    assert adapters.optimizer < plain.optimizer / 50
    for backend in ("jax", "tensorflow", "torch"):
        assert memory(SHAPES["1B"], backend=backend).update == 0
    assert memory(SHAPES["1B"], lora_rank=16, backend="jax").update == 0
    copied = memory(SHAPES["1B"], lora_rank=16, backend="torch")
    assert copied.update == copied.gradients + copied.optimizer


@pytest.mark.backend_independent
def test_shapes_have_the_sizes_of_their_models():
    sizes = [SHAPES[name].parameters / 1e9 for name in ("1B", "7B", "27B")]
    # As their makers count them; Gemma's without its encoder of images.
    assert sizes == pytest.approx([1.236, 7.616, 27.0], rel=0.002)


HALF = {"dtype": "bfloat16"}
BOTH = {"rematerialize": True, "micro_batches": 4}
# In the order of the table's rows.
IN_THE_TABLE = (
    {},
    {"rematerialize": True},
    BOTH,
    {**HALF, **BOTH},
    {**HALF, "lora_rank": 16},
    {**HALF, "lora_rank": 16, **BOTH},
)


@pytest.mark.backend_independent
def test_the_table_of_the_page_is_what_is_estimated():
    page = Path(__file__).parent.parent / "docs" / "memory.md"
    table = page.read_text("utf-8").split("|---|---|---|---|\n", 1)[1].split("\n\n")[0]
    rows = [line.split("|")[2:5] for line in table.splitlines()]
    assert len(rows) == len(IN_THE_TABLE)
    for row, options in zip(rows, IN_THE_TABLE):
        for cell, shape in zip(row, SHAPES.values()):
            sizes = [
                memory(shape, batch_size=size, backend="jax", **options).total / 2**30
                for size in (1, 16)
            ]
            assert cell.strip() == " / ".join(f"{size:.0f}" for size in sizes)


@pytest.mark.backend_independent
def test_the_paper_s_rows_hold_127_blocks():
    sampler = keras_ebft.BlockSampler()
    one, two = (
        work(SHAPES["1B"], 1024, rows, sampler=sampler, feature_depth=0.0)
        for rows in (1, 2)
    )
    assert two.total == pytest.approx(2 * one.total)
    per_token = 2 * SHAPES["1B"].num_layers * SHAPES["1B"].projections
    head = 2 * SHAPES["1B"].embeddings
    assert one.documents == 1024 * per_token
    assert one.rollouts == 4 * 127 * (7 * per_token + 8 * head)
    assert one.seconds(1e12, 0.5) == pytest.approx(one.total / 5e11)


@pytest.mark.slow
@pytest.mark.skipif(not ON_TORCH, reason="PyTorch counts what runs")
@pytest.mark.usefixtures("products_that_are_counted")
def test_operations_of_a_step():
    from torch.utils.flop_counter import FlopCounterMode

    # Wide, so that attention's own products are little.
    shape = DecoderShape(4, 32, 1024, 2, 1, 16, 97)
    model = build(shape)
    model.compile("sgd")
    with FlopCounterMode(display=False) as counter:
        model.train_on_batch(texts() % 97)
    expected = work(shape, **DOCUMENTS).total
    assert 0.99 * expected < counter.get_total_flops() < 1.06 * expected


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memory("1B"), TypeError, "DecoderShape.*SHAPES"),
        (lambda: memory(SHAPES["1B"], dtype="int8"), ValueError, "mixed_bfloat16"),
        (lambda: memory(SHAPES["1B"], micro_batches=3), ValueError, "num_samples=4"),
        (lambda: memory(SHAPES["1B"], backend="numpy"), ValueError, "tensorflow"),
        (lambda: work(SHAPES["1B"], length=8), ValueError, "length"),
        (lambda: work(SHAPES["1B"]).seconds(1e12, 2.0), ValueError, "utilization"),
        (lambda: DecoderShape(0, 1, 1, 1, 1, 1, 1), ValueError, "num_layers"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
