"""The work of a step, counted in multiplications rather than seconds."""

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

import keras_ebft

if keras.backend.backend() != "torch":
    pytest.skip(
        "PyTorch counts what runs; compiled programs count a loop's body once",
        allow_module_level=True,
    )

from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from phases import make_phase

LENGTH, SAMPLES, ROLLOUT, LAYERS, WIDTH, VOCABULARY = 96, 3, 8, 4, 32, 16
# Wide, so that attention within a layer is little beside its products.
INTERMEDIATE = 2048
BLOCKS = (LENGTH - ROLLOUT - 8) // 8 + 1
GENERATED = SAMPLES * BLOCKS * ROLLOUT
# A block's last token is embedded, but neither continued nor scored.
READ = SAMPLES * BLOCKS * (ROLLOUT - 1)

# Token-forwards through all layers; a backward pass counts as two.
TOKEN_FORWARDS = {
    "prefill": LENGTH,
    "rollout": READ,
    "features": 0.75 * (LENGTH + GENERATED),
    "policy": 3 * LENGTH + 3 * READ,
}
HEAD_ROWS = {"rollout": GENERATED, "policy": 4 * GENERATED}


@pytest.fixture(scope="module")
def model():
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=LAYERS,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=WIDTH,
        intermediate_dim=INTERMEDIATE,
    )
    model = keras_ebft.EBFTModel(
        keras_hub.models.LlamaCausalLM(backbone),
        sampler=keras_ebft.BlockSampler(num_samples=SAMPLES),
        seed=0,
    )
    model.compile("adam")
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("products_that_are_counted")
@pytest.mark.parametrize("phase", TOKEN_FORWARDS)
def test_token_forwards_of_a_phase(model, phase):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH))
    run = make_phase(phase, model, tokens.astype("int32"))
    with FlopCounterMode(display=False) as counter:
        run()
    projections = WIDTH * (2 * WIDTH + 2 * WIDTH // 2)
    per_token = 2 * LAYERS * (projections + 3 * WIDTH * INTERMEDIATE)
    head = 2 * HEAD_ROWS.get(phase, 0) * WIDTH * VOCABULARY
    expected = TOKEN_FORWARDS[phase] * per_token + head
    # What is above is attention; one more pass of the documents alone, the smallest
    # of all mistakes, would be 11 % of the largest phase.
    assert 0.99 * expected < counter.get_total_flops() < 1.06 * expected
