"""Small models, gradients on any backend, conversions."""

import contextlib
import inspect
import io
import os
import runpy
import sys
from unittest import mock

import keras
import keras_hub
import numpy as np
import tokenizers
from keras import ops

# Here, because the processes that tests start import this too.
if keras.backend.backend() == "tensorflow" and os.environ.get("UNOPTIMIZED_GRAPHS"):
    import tensorflow as tf

    # Graphs stay as they are traced, but for what nobody reads. Without the optimizer
    # of all (`disable_meta_optimizer`) each function called holds a copy of all
    # functions: a process came to 16 GiB.
    passes = (
        "layout_optimizer",
        "constant_folding",
        "shape_optimization",
        "remapping",
        "arithmetic_optimization",
        "dependency_optimization",
        "loop_optimization",
        "function_optimization",
        "scoped_allocator_optimization",
        "pin_to_host_optimization",
        "implementation_selector",
    )
    tf.config.optimizer.set_experimental_options(dict.fromkeys(passes, False))

models = keras_hub.models

VOCABULARY = 31

# Compiled as on accelerators: by XLA also on TensorFlow.
XLA = {"jit_compile": keras.backend.backend() != "torch"}

ROTARY = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
}


def set_random_seed(seed):
    """What Keras draws from here on, NumPy and Python.

    TensorFlow's own seed is set once (`conftest.py`): setting it throws away all graphs
    that were made ready to run, of models that many tests share, too.
    """
    with mock.patch("tensorflow.random.set_seed"):
        keras.utils.set_random_seed(seed)


def to_numpy(value):
    """A NumPy array that shares no memory with `value`."""
    if hasattr(value, "detach"):
        value = value.detach()
    return np.array(ops.convert_to_numpy(value))


def run_script(path, *arguments):
    """What a script prints, run in this process, which has imported what is slow.

    Args:
        path: `Path`; what lies beside it can be imported, as where Python runs it.
        *arguments: str, of the command line.
    """
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def llama(**changes):
    """A two-layer Llama with grouped queries and an untied head."""
    backbone = models.LlamaBackbone(**{**ROTARY, **changes})
    return randomise(models.LlamaCausalLM(backbone))


def randomise(causal_lm, scale=0.3, seed=0):
    """The same weights for everyone, large enough for caps and windows to matter."""
    random = np.random.default_rng(seed)
    weights = []
    for weight in causal_lm.get_weights():
        noise = scale * random.normal(size=weight.shape)
        # Vectors are norm scales and biases, around their initial values.
        weights.append((noise + (weight if weight.ndim == 1 else 0)).astype("float32"))
    causal_lm.set_weights(weights)
    return causal_lm


def family(name, **changes):
    """A tiny randomised `CausalLM` of a supported family."""
    learned = {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "max_sequence_length": 40,
    }
    gemma = {**ROTARY, "head_dim": 8}
    windowed = {"use_sliding_window_attention": True, "sliding_window_size": 5}
    alibi = {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
    }
    experts = {"num_experts": 3, "top_k": 2}
    linear = {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    table = {
        "Llama": ("Llama", ROTARY),
        "Llama3": ("Llama3", {**ROTARY, "tie_word_embeddings": True}),
        "Mistral": ("Mistral", {**ROTARY, "sliding_window": 5}),
        "Qwen": ("Qwen", {**ROTARY, **windowed}),
        "Qwen3": ("Qwen3", {**ROTARY, "head_dim": 4, "sliding_window_size": 5}),
        "Gemma": ("Gemma", gemma),
        "Gemma2": (
            "Gemma",
            {
                **gemma,
                **windowed,
                "use_post_ffw_norm": True,
                "use_post_attention_norm": True,
                "attention_logit_soft_cap": 2.0,
                "final_logit_soft_cap": 3.0,
                "query_head_dim_normalize": False,
            },
        ),
        "Gemma3": (
            "Gemma3",
            {
                **gemma,
                **windowed,
                "num_layers": 7,
                "image_size": None,
                "use_query_key_norm": True,
            },
        ),
        "Gemma3n": (
            "Gemma3n",
            {
                "text_vocab_size": VOCABULARY,
                "text_hidden_size": 16,
                "num_hidden_layers": 4,
                "pad_token_id": 0,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": [24, 24, 20, 24],
                "hidden_activation": "gelu_approximate",
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 5,
                "rope_theta": 1e6,
                "max_position_embeddings": 64,
                # The last ids have no inputs per layer.
                "vocab_size_per_layer_input": VOCABULARY - 4,
                "hidden_size_per_layer_input": 4,
                "altup_num_inputs": 3,
                "laurel_rank": 2,
                "activation_sparsity_pattern": [0.8, 0.0, 0.0, 0.0],
                "num_kv_shared_layers": 2,
                "final_logit_soft_cap": 3.0,
            },
        ),
        "GPT2": ("GPT2", learned),
        "OPT": ("OPT", learned),
        "Bloom": ("Bloom", alibi),
        "Falcon": ("Falcon", {**alibi, "num_attention_heads": 4}),
        "GPTNeoX": ("GPTNeoX", {**alibi, "rotary_percentage": 0.5}),
        "Mixtral": ("Mixtral", {**ROTARY, **experts, "sliding_window": 5}),
        "Phi3": ("Phi3", ROTARY),
        "Phi3 long": (
            "Phi3",
            {
                **ROTARY,
                "max_sequence_length": 32,
                "pretraining_sequence_length": 16,
                "rope_scaling_type": "su",
                "rope_scaling_short_factor": [1.0, 1.5],
                "rope_scaling_long_factor": [2.0, 3.0],
            },
        ),
        "QwenMoe": (
            "QwenMoe",
            {
                **ROTARY,
                **experts,
                **windowed,
                "moe_intermediate_dim": 12,
                "shared_expert_intermediate_dim": 12,
            },
        ),
        "Qwen3Moe": (
            "Qwen3Moe",
            {
                **ROTARY,
                **experts,
                "head_dim": 4,
                "moe_intermediate_dim": 12,
                "sliding_window_size": 5,
            },
        ),
        "SmolLM3": (
            "SmolLM3",
            {
                "vocabulary_size": VOCABULARY,
                "num_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "hidden_dim": 16,
                "intermediate_dim": 24,
                "attention_bias": False,
                "attention_dropout": 0.0,
                "rope_layer_enabled_list": [True, False],
                "layer_types": ["attention", "attention"],
                "mlp_bias": False,
                "layer_norm_epsilon": 1e-5,
                "max_position_embeddings": 40,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        ),
        "Gemma4": (
            "Gemma4",
            {
                **gemma,
                **windowed,
                "image_size": None,
                "final_logit_soft_cap": 3.0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        # Wider heads, fewer keys, and keys that are values, in layers that see all.
        "Gemma4 global": (
            "Gemma4",
            {
                **gemma,
                **windowed,
                "image_size": None,
                "global_head_dim": 12,
                "num_global_key_value_heads": 1,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        "Gemma4 shared": (
            "Gemma4",
            {
                **gemma,
                **windowed,
                "num_layers": 4,
                "image_size": None,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 4,
                "use_double_wide_mlp": True,
            },
        ),
        "GptOss": (
            "GptOss",
            {**ROTARY, **experts, "sliding_window": 5, "head_dim": 4},
        ),
        "Qwen3_5": ("Qwen3_5", {**ROTARY, **linear}),
        "Qwen3_5Moe": (
            "Qwen3_5Moe",
            {
                **ROTARY,
                **linear,
                **experts,
                "moe_intermediate_dim": 12,
                "shared_expert_intermediate_size": 12,
            },
        ),
        "RWKV7": (
            "RWKV7",
            {
                "hidden_size": 16,
                "head_size": 4,
                "num_layers": 2,
                "vocabulary_size": VOCABULARY,
                "intermediate_dim": 24,
                "gate_lora": 4,
                "mv_lora": 4,
                "aaa_lora": 4,
                "decay_lora": 4,
            },
        ),
    }
    prefix, config = table[name]
    backbone_class = getattr(models, f"{prefix}Backbone")
    known = inspect.signature(backbone_class).parameters
    if prefix == "Falcon":
        config = {k: v for k, v in config.items() if k != "num_heads"}
    if prefix in ("Qwen3_5Moe",):
        config = {k: v for k, v in config.items() if k != "intermediate_dim"}
    if prefix == "GptOss" and "head_dim" not in known:
        config.pop("head_dim")
    unknown = set(config) - set(known)
    assert not unknown, f"{prefix}Backbone does not know {unknown}"
    backbone = backbone_class(**{**config, **changes})
    causal_lm_class = getattr(models, f"{prefix}CausalLM")
    return randomise(causal_lm_class(backbone=backbone, preprocessor=None))


SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def byte_causal_lm():
    """A Llama that reads bytes."""
    alphabet = [
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        *SPECIAL_TOKENS,
    ]
    tokenizer = models.Llama3Tokenizer(
        vocabulary={token: index for index, token in enumerate(alphabet)},
        merges=["a b"],
    )
    backbone = models.Llama3Backbone(
        vocabulary_size=len(alphabet),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
    )
    preprocessor = models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=24)
    return models.Llama3CausalLM(backbone, preprocessor=preprocessor)


def documents(batch, length, vocabulary=VOCABULARY, seed=0):
    """Random token ids `[batch, length]`."""
    random = np.random.default_rng(seed)
    return random.integers(0, vocabulary, (batch, length)).astype("int32")


def value_and_gradients(function, variables):
    """A scalar function of Keras variables: its value and gradient, as NumPy."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function()

        value, found = jax.jit(jax.value_and_grad(stateless))(
            [v.value for v in variables]
        )
        return float(value), [np.array(gradient) for gradient in found]
    if backend == "torch":
        import torch

        values = [variable.value for variable in variables]
        value = function()
        found = torch.autograd.grad(value, values, allow_unused=True)
        return float(value.detach()), [
            np.zeros(v.shape) if g is None else g.float().numpy().copy()
            for v, g in zip(values, found)
        ]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = function()
    found = tape.gradient(value, [variable.value for variable in variables])
    return float(value), [
        np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy()
        for v, g in zip(variables, found)
    ]


def gradients(function, variables):
    """Gradient of a scalar function of Keras variables, as NumPy arrays."""
    return value_and_gradients(function, variables)[1]


def flat(arrays):
    """All arrays as one float64 vector."""
    return np.concatenate([np.ravel(a).astype("float64") for a in arrays])
