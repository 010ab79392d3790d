"""A Llama of 3M parameters, trained on the spot: for tests, or in want of another.

What it writes is no language, and its features mean little: it shows that every
line runs, not what a method does.
"""

import hashlib

import keras
import keras_hub

import keras_ebft

VOCABULARY = 2048
CHARACTERS = 480


def load(texts, folder, sequence_length, steps=700, layers=6, width=192):
    """A small Llama and its tokenizer, trained on texts once and then cached.

    Args:
        texts: list of strings.
        folder: `pathlib.Path` of the cache.
        sequence_length: int, tokens per text of the preprocessor.
        steps: int, of four pieces of text each.
        layers: int.
        width: int.

    Returns:
        `keras_hub.models.Llama3CausalLM`.
    """
    pieces = [piece for text in texts for piece in cut(text)][: 4 * steps]
    tokenizer = keras_ebft.data.train_byte_pair_tokenizer(pieces, VOCABULARY)
    causal_lm = build(tokenizer, sequence_length, layers, width)
    key = repr((steps, layers, width, sequence_length, texts))
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = folder / f"micro_{name}.weights.h5"
    if path.exists():
        causal_lm.backbone.load_weights(path)
    else:
        pretrain(causal_lm, pieces, steps)
        folder.mkdir(parents=True, exist_ok=True)
        causal_lm.backbone.save_weights(path)
    return causal_lm


def cut(text):
    """Pieces of about `CHARACTERS`, cut at line ends."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= CHARACTERS:
            pieces.append(piece)
            piece = ""
    return pieces


def build(tokenizer, sequence_length, layers, width):
    """The model with random weights."""
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=layers,
        num_query_heads=6,
        num_key_value_heads=3,
        hidden_dim=width,
        intermediate_dim=width * 8 // 3,
        tie_word_embeddings=True,
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=preprocessor)


def pretrain(causal_lm, pieces, steps):
    """Plain next-token training."""
    rate = keras.optimizers.schedules.CosineDecay(
        1e-4, steps, warmup_target=2e-3, warmup_steps=max(steps // 10, 1), alpha=0.05
    )
    model = keras_ebft.EBFTModel.sft(causal_lm, seed=0)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0))
    # Small batches: for so few tokens, more steps teach more than less noise does.
    model.fit(pieces, batch_size=4)
