"""The model that an example starts from, chosen on its command line."""

import os
import sys
from pathlib import Path

import keras_hub
import micro_model
import numpy as np

import keras_ebft


def add_arguments(parser):
    """`--preset`, `--model` and what belongs to them."""
    group = parser.add_argument_group("model")
    group.add_argument("--preset", help="of KerasHub, in place of --model")
    group.add_argument("--model", choices=("smollm2", "micro"), default="smollm2")
    group.add_argument("--rank", type=int, default=8, help="of adapters; 0: none")
    group.add_argument("--micro-steps", type=int, default=700)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    group.add_argument("--cache", type=Path, default=cache / "keras_ebft")


def load(arguments, texts):
    """The model, with adapters; ends the program with a sentence where it cannot.

    Args:
        arguments: what `add_arguments` parsed, and `length`, tokens per row.
        texts: list of strings, which the micro model is trained on.

    Returns:
        `keras_hub.models.CausalLM`.
    """
    causal_lm = _load(arguments, texts)
    if arguments.rank:
        causal_lm.backbone.enable_lora(arguments.rank)
    trained = sum(int(np.prod(v.shape)) for v in causal_lm.trainable_variables)
    print(f"{trained:,} of {causal_lm.count_params():,} parameters are trained")
    return causal_lm


def _load(arguments, texts):
    if arguments.preset:
        return keras_hub.models.CausalLM.from_preset(arguments.preset)
    if arguments.model == "micro":
        return micro_model.load(
            texts, arguments.cache, arguments.length, arguments.micro_steps
        )
    try:
        return keras_ebft.models.smollm2(sequence_length=arguments.length)
    except ImportError as error:
        sys.exit(f"{error} Or run with --model micro, which needs no package.")
