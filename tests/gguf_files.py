"""Tiny GGUF files of random weights, and a byte-pair tokenizer for them."""

import json

import gguf
import numpy as np
import tokenizers

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, INNER, LAYERS = 256, 8, 2, 32, 256, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = (
    "def f(x):\n    return x + 123\n\n\nclass A:\n    def g(self):  # it's 42\n"
    "        return self.x\n"
) * 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TYPES = gguf.GGMLQuantizationType


def byte_pairs():
    """`(tokens, merges)` of a small byte-level byte-pair encoding of code."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    ways = tokenizers.pre_tokenizers
    # No token holds two digits, as in SmolLM2.
    trained.pre_tokenizer = ways.Sequence(
        [ways.Digits(individual_digits=True), ways.ByteLevel(add_prefix_space=False)]
    )
    alphabet = ways.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320 - len(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return [*SPECIAL, *sorted(model["vocab"], key=model["vocab"].get)], merges


def write(
    path,
    architecture="llama",
    tied=True,
    kind="F32",
    pre="smollm",
    settings=None,
    tensors=None,
    packed=None,
    seed=0,
):
    """Writes a model.

    Args:
        path: file.
        architecture: str.
        tied: bool, whether there is no `output.weight`.
        kind: str, type of the matrices.
        pre: str, `tokenizer.ggml.pre`.
        settings: dict of further settings; `None` leaves one out.
        tensors: dict of further tensors.
        packed: dict of quantized tensors, `(bytes, kind)`, in place of others.
        seed: int.
    """
    packed = packed or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    tokens, merges = byte_pairs()
    for name, value in {
        **header(architecture, pre, len(tokens)),
        **(settings or {}),
    }.items():
        if value is not None:
            add(writer, name, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    weights = random_weights(architecture, len(tokens), tied, seed)
    for name, value in {**weights, **(tensors or {})}.items():
        if name in packed:
            data, type_name = packed[name]
            writer.add_tensor(name, data, raw_dtype=TYPES[type_name])
        elif value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
        else:
            data = gguf.quants.quantize(value, TYPES[kind])
            writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(architecture, pre, vocabulary):
    return {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KEY_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 50000.0,
        f"{architecture}.rope.dimension_count": HEAD_DIM,
        f"{architecture}.vocab_size": vocabulary,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def add(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def random_weights(architecture, vocabulary, tied, seed):
    random = np.random.default_rng(seed)

    def matrix(outputs, inputs):
        return (random.normal(size=(outputs, inputs)) / inputs**0.5).astype("float32")

    def vector(size, mean=1.0):
        return (mean + 0.1 * random.normal(size=size)).astype("float32")

    keys = KEY_HEADS * HEAD_DIM
    weights = {
        "token_embd.weight": matrix(vocabulary, WIDTH),
        "output_norm.weight": vector(WIDTH),
    }
    if not tied:
        weights["output.weight"] = matrix(vocabulary, WIDTH)
    for index in range(LAYERS):
        layer = {
            "attn_norm.weight": vector(WIDTH),
            "attn_q.weight": matrix(WIDTH, WIDTH),
            "attn_k.weight": matrix(keys, WIDTH),
            "attn_v.weight": matrix(keys, WIDTH),
            "attn_output.weight": matrix(WIDTH, WIDTH),
            "ffn_norm.weight": vector(WIDTH),
            "ffn_gate.weight": matrix(INNER, WIDTH),
            "ffn_up.weight": matrix(INNER, WIDTH),
            "ffn_down.weight": matrix(WIDTH, INNER),
        }
        if architecture == "qwen2":
            layer |= {
                f"attn_{name}.bias": vector(size, 0.0)
                for name, size in (("q", WIDTH), ("k", keys), ("v", keys))
            }
        weights |= {f"blk.{index}.{name}": value for name, value in layer.items()}
    return weights


def k_quantized(kind, shape, seed=0):
    """Any bytes are such a tensor, as long as its scales are small.

    Args:
        kind: `"Q4_K"` or `"Q6_K"`.
        shape: `(outputs, inputs)`.
        seed: int.
    """
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    random = np.random.default_rng(seed)
    blocks = (shape[0], shape[1] // block)
    data = random.integers(0, 256, (*blocks, size), dtype="uint8")
    scale = np.full((*blocks, 1), 2e-4, "float16").view("uint8")
    if kind == "Q4_K":
        data[..., 0:2] = data[..., 2:4] = scale
    else:
        data[..., -2:] = scale
    return data.reshape(shape[0], -1)
