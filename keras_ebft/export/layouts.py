"""Configuration and weights in the Hugging Face layout, by layout.

KerasHub exports some families itself, and those it exports rightly are left to
it. Gemma with several key heads and Gemma 2 come out wrong, Qwen 2 without its
sliding window, Llama and Qwen 3 not at all: those are written here.

A family names its layout in its record (`keras_ebft.networks.families`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_ebft.networks import family_of


class Layout(NamedTuple):
    """One layout, loaded back and found equal in the tests.

    Attributes:
        write: function of a backbone that returns `(config, weights)`; `None` where
            KerasHub's own export is right.
        expected: function of a backbone, what its settings must be for the layout to
            say them, as a str; `None` where they are.
    """

    write: Callable | None = None
    expected: Callable = lambda backbone: None


def layout_of(backbone):
    """The `Layout` of a backbone.

    Raises:
        ValueError: for a family without one, or settings of the backbone that the
            layout does not know.
    """
    name, layout = type(backbone).__name__, family_of(backbone).layout
    if layout is None:
        raise ValueError(
            "Expected a family with a Hugging Face layout that was tested. Received: "
            f"{name}. Use causal_lm.save_to_preset(), which KerasHub loads."
        )
    expected = LAYOUTS[layout].expected(backbone)
    if expected is not None:
        raise ValueError(
            f"Expected a {name} with {expected}, which is what the Hugging Face "
            "layout can say. Received: others. Use causal_lm.save_to_preset()."
        )
    return LAYOUTS[layout]


def _of_gemma(backbone):
    post = _has_post_norms(backbone)
    caps = (backbone.attention_logit_soft_cap, backbone.final_logit_soft_cap)
    second = any(post) or any(caps) or backbone.use_sliding_window_attention
    if second and not (all(post) and backbone.use_sliding_window_attention):
        return "the settings of Gemma or all of those of Gemma 2"
    return None


def _of_gemma3(backbone):
    if not all(_has_post_norms(backbone)):
        return "use_post_attention_norm=True and use_post_ffw_norm=True"
    return None


def _of_gpt2(backbone):
    if backbone.intermediate_dim != 4 * backbone.hidden_dim:
        return "an intermediate_dim of 4 * hidden_dim"
    return None


def _has_post_norms(backbone):
    return backbone.use_post_attention_norm, backbone.use_post_ffw_norm


def _llama(backbone):
    config = {
        **_rotary_config(backbone, "LlamaForCausalLM", "llama"),
        "head_dim": backbone.hidden_dim // backbone.num_query_heads,
        "mlp_bias": False,
    }
    factor = backbone.get_config().get("rope_position_scaling_factor", 1.0)
    if factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config, _rotary_weights(backbone)


def _qwen2(backbone):
    windowed = backbone.use_sliding_window_attention
    config = {
        **_rotary_config(backbone, "Qwen2ForCausalLM", "qwen2"),
        "use_sliding_window": windowed,
        "sliding_window": backbone.sliding_window_size,
    }
    weights = _rotary_weights(backbone)
    for index, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        for name in ("query", "key", "value"):
            bias = _array(getattr(attention, f"_{name}_dense").bias)
            key = f"model.layers.{index}.self_attn.{name[0]}_proj.bias"
            weights[key] = bias.reshape(-1)
    return config, weights


def _qwen3(backbone):
    window = backbone.sliding_window_size
    config = {
        **_rotary_config(backbone, "Qwen3ForCausalLM", "qwen3"),
        "head_dim": backbone.head_dim,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
    weights = _rotary_weights(backbone)
    for index, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        prefix = f"model.layers.{index}.self_attn"
        norms = attention._query_dense_layer_norm, attention._key_dense_layer_norm
        for name, norm in zip(("q_norm", "k_norm"), norms):
            weights[f"{prefix}.{name}.weight"] = _array(norm.scale)
    return config, weights


def _rotary_config(backbone, architecture, model_type):
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim,
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "rope_theta": backbone.rope_max_wavelength,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
    }


def _rotary_weights(backbone):
    weights = _ends(backbone, "sequence_output_layernorm")
    for index, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        weights |= {
            f"model.layers.{index}.{name}.weight": value
            for name, value in {
                "input_layernorm": _array(layer._self_attention_layernorm.scale),
                "post_attention_layernorm": _array(layer._feedforward_layernorm.scale),
                # [D, heads, head_dim] and, of the output, [heads, head_dim, D].
                "self_attn.q_proj": _matrix(attention._query_dense, 1),
                "self_attn.k_proj": _matrix(attention._key_dense, 1),
                "self_attn.v_proj": _matrix(attention._value_dense, 1),
                "self_attn.o_proj": _matrix(attention._output_dense, 2),
                "mlp.gate_proj": _matrix(layer._feedforward_gate_dense, 1),
                "mlp.up_proj": _matrix(layer._feedforward_intermediate_dense, 1),
                "mlp.down_proj": _matrix(layer._feedforward_output_dense, 1),
            }.items()
        }
    return weights


def _gemma(backbone):
    """Gemma, or Gemma 2 where the backbone is one."""
    is_second = backbone.use_post_attention_norm
    version = "2" if is_second else ""
    config = {
        "architectures": [f"Gemma{version}ForCausalLM"],
        "model_type": f"gemma{version}",
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim // 2,
        "head_dim": backbone.head_dim,
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    if is_second:
        # What layers do: KerasHub's pass the backbone's own setting by.
        normalised = backbone.transformer_layers[0].attention.query_head_dim_normalize
        per_head = backbone.hidden_dim // backbone.num_query_heads
        config |= {
            "query_pre_attn_scalar": backbone.head_dim if normalised else per_head,
            "final_logit_softcapping": backbone.final_logit_soft_cap,
            "attn_logit_softcapping": backbone.attention_logit_soft_cap,
            "sliding_window": backbone.sliding_window_size,
        }
    weights = _ends(backbone, "final_normalization")
    for index, layer in enumerate(backbone.transformer_layers):
        weights |= {
            f"model.layers.{index}.{name}.weight": value
            for name, value in _gemma_layer(layer, is_second).items()
        }
    return config, weights


def _gemma_layer(layer, is_second):
    attention = layer.attention
    weights = {
        "input_layernorm": _array(layer.pre_attention_norm.scale),
        # [heads, D, head_dim] and, of the output, [heads, head_dim, D].
        "self_attn.q_proj": _head_matrix(attention.query_dense),
        "self_attn.k_proj": _head_matrix(attention.key_dense),
        "self_attn.v_proj": _head_matrix(attention.value_dense),
        "self_attn.o_proj": _matrix(attention.output_dense, 2),
        "mlp.gate_proj": _matrix(layer.gating_ffw, 1),
        "mlp.up_proj": _matrix(layer.gating_ffw_2, 1),
        "mlp.down_proj": _matrix(layer.ffw_linear, 1),
    }
    if not is_second:
        weights["post_attention_layernorm"] = _array(layer.pre_ffw_norm.scale)
        return weights
    return {
        **weights,
        "post_attention_layernorm": _array(layer.post_attention_norm.scale),
        "pre_feedforward_layernorm": _array(layer.pre_ffw_norm.scale),
        "post_feedforward_layernorm": _array(layer.post_ffw_norm.scale),
    }


def _ends(backbone, final_norm):
    embedding = backbone.token_embedding
    weights = {
        "model.embed_tokens.weight": _array(embedding.embeddings),
        "model.norm.weight": _array(backbone.get_layer(final_norm).scale),
    }
    if not embedding.tie_weights:
        head = _array(embedding.reverse_embeddings)
        weights["lm_head.weight"] = np.ascontiguousarray(head.T)
    return weights


def _matrix(layer, input_axes):
    """A kernel as `[outputs, inputs]`, its first `input_axes` axes being inputs."""
    kernel = _array(layer.kernel)
    inputs = int(np.prod(kernel.shape[:input_axes]))
    return np.ascontiguousarray(kernel.reshape(inputs, -1).T)


def _head_matrix(layer):
    """A kernel `[heads, D, head_dim]` as `[heads * head_dim, D]`."""
    kernel = np.swapaxes(_array(layer.kernel), 1, 2)
    return np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]))


def _array(variable):
    return np.array(ops.convert_to_numpy(variable))


LAYOUTS = {
    "gemma": Layout(_gemma, _of_gemma),
    "gemma3": Layout(expected=_of_gemma3),
    "gpt2": Layout(expected=_of_gpt2),
    "llama": Layout(_llama),
    "llama3": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(_qwen2),
    "qwen3": Layout(_qwen3),
}
