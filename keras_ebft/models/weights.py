"""From the tensors of a GGUF file to the variables of a KerasHub backbone."""

import numpy as np

# Parts of a decoder layer by the name of their tensors.
NORMS = {
    "attn_norm": "_self_attention_layernorm",
    "ffn_norm": "_feedforward_layernorm",
}
PROJECTIONS = {
    "attn_q": "_query_dense",
    "attn_k": "_key_dense",
    "attn_v": "_value_dense",
    "attn_output": "_output_dense",
}
FEEDFORWARD = {
    "ffn_gate": "_feedforward_gate_dense",
    "ffn_up": "_feedforward_intermediate_dense",
    "ffn_down": "_feedforward_output_dense",
}


def load_weights(backbone, file, interleaved):
    """Assigns all weights of a Llama-like backbone.

    Args:
        backbone: `Llama3Backbone` or `keras_hub.models.QwenBackbone`.
        file: `GGUFFile`.
        interleaved: bool, whether queries and keys are in llama.cpp's order.
    """
    embedding = backbone.token_embedding
    embedding.embeddings.assign(file.tensor("token_embd.weight"))
    if not embedding.tie_weights:
        embedding.reverse_embeddings.assign(file.tensor("output.weight").T)
    backbone.layer_norm.scale.assign(file.tensor("output_norm.weight"))
    heads = {
        "attn_q": backbone.num_query_heads,
        "attn_k": backbone.num_key_value_heads,
    }
    for index, layer in enumerate(backbone.transformer_layers):
        _load_layer(layer, file, f"blk.{index}", heads if interleaved else {})


def _load_layer(layer, file, prefix, interleaved_heads):
    for name, attribute in NORMS.items():
        getattr(layer, attribute).scale.assign(file.tensor(f"{prefix}.{name}.weight"))
    for name, attribute in FEEDFORWARD.items():
        kernel = file.tensor(f"{prefix}.{name}.weight").T
        getattr(layer, attribute).kernel.assign(kernel)
    for name, attribute in PROJECTIONS.items():
        dense = getattr(layer._self_attention_layer, attribute)
        matrix = file.tensor(f"{prefix}.{name}.weight")
        if name in interleaved_heads:
            matrix = halves_from_pairs(matrix, interleaved_heads[name])
        dense.kernel.assign(matrix.T.reshape(dense.kernel.shape))
        if dense.bias is not None:
            bias = file.tensor(f"{prefix}.{name}.bias")
            dense.bias.assign(bias.reshape(dense.bias.shape))


def halves_from_pairs(matrix, heads):
    """Rows in the order of two halves per head, out of llama.cpp's pairs.

    The two parts that a rotary embedding turns together are neighbours in
    llama.cpp, and half a head apart elsewhere.

    Args:
        matrix: array `[heads * head_dim, inputs]`.
        heads: int.
    """
    outputs, inputs = matrix.shape
    pairs = matrix.reshape(heads, outputs // heads // 2, 2, inputs)
    return np.swapaxes(pairs, 1, 2).reshape(outputs, inputs)
