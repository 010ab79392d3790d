"""A program that works where TensorFlow cannot be imported; run by a test.

    python tests/without_tensorflow.py FOLDER ...

Trains and generates with presets from folders, then says as JSON which families'
preprocessors could not be made, and what the tokenizer of Gemma 3 allows alone.
"""

import json
import sys

import block_tensorflow  # (before anything else)
import keras
import keras_hub
from text_models import FAMILIES, LENGTH, TEXTS, make_tokenizer, text_model

import keras_ebft

SAMPLER = keras_ebft.BlockSampler(rollout_length=2, stride=5, context_length=4)


def train(causal_lm, x):
    network = keras_ebft.FeatureNetwork(layers=(1,))
    model = keras_ebft.EBFTModel(causal_lm, SAMPLER, network, seed=0)
    model.compile(keras.optimizers.SGD(0.01))
    return model.fit(x, batch_size=2, verbose=0).history["loss"][0]


def packed(tokenizer):
    """Rows made by the tokenizer alone."""
    rows = keras_ebft.data.pack(list(TEXTS), tokenizer, length=LENGTH).load()
    return rows.arrays


def from_folder(folder):
    """Strings and packed rows in, text out."""
    causal_lm = keras_hub.models.CausalLM.from_preset(folder)
    causal_lm.preprocessor.sequence_length = LENGTH
    losses = [
        train(causal_lm, list(TEXTS)),
        train(causal_lm, packed(causal_lm.preprocessor.tokenizer)),
    ]
    return losses, causal_lm.generate("abab", max_length=10)


def refused():
    """Families whose preprocessor needs TensorFlow, and by what error."""
    found = {}
    for name in FAMILIES:
        try:
            text_model(name)
        except ImportError as error:
            found[name] = str(error)
    return found


def by_tokenizer_alone(name):
    """Training without a preprocessor, and text by way of the tokenizer."""
    tokenizer = make_tokenizer(name)
    size = tokenizer.vocabulary_size()
    causal_lm = keras_hub.models.Gemma3CausalLM(
        preprocessor=None,
        backbone=keras_hub.models.Gemma3Backbone(
            vocabulary_size=size,
            image_size=None,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            hidden_dim=8,
            intermediate_dim=8,
        ),
    )
    train(causal_lm, packed(tokenizer))
    ids = keras.ops.convert_to_tensor([[*tokenizer("abab"), 0, 0]], dtype="int32")
    # `generate` of Gemma 3 itself fails without a preprocessor, after this.
    generate = causal_lm.make_generate_function()
    written = generate({"token_ids": ids, "padding_mask": ids > 0})["token_ids"]
    return tokenizer.detokenize(keras.ops.convert_to_numpy(written)[0].tolist())


def imported():
    """Modules of TensorFlow that were imported all the same."""
    return [
        name
        for name, module in sys.modules.items()
        if module is not None and name.split(".")[0] in block_tensorflow.BLOCKED
    ]


def main(folders):
    found = {
        "trained": [from_folder(folder) for folder in folders],
        "refused": refused(),
        "tokenizer": by_tokenizer_alone("Gemma3"),
        "imported": imported(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
