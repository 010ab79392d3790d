"""The chat template that a model's tokenizer carries."""

from typing import Any

import keras_hub

from keras_ebft.data import ChatTemplate


def chat_template(causal_lm: keras_hub.models.CausalLM) -> ChatTemplate:
    """The chat template of a model that came with one.

    Args:
        causal_lm: what `keras_ebft.models.from_gguf` or `smollm2` returned.

    Returns:
        `keras_ebft.data.ChatTemplate`.

    Raises:
        ImportError: if `jinja2` is not installed.
        ValueError: if the model has no template.

    Example:
    ```python
    causal_lm = keras_ebft.models.smollm2()
    template = keras_ebft.models.chat_template(causal_lm)
    causal_lm.generate(template.prompt([{"role": "user", "content": "Hello!"}]))
    ```
    """
    tokenizer: Any = getattr(causal_lm.preprocessor, "tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise ValueError(
            "Expected a model whose tokenizer carries a chat template. Received: a "
            f"{type(causal_lm).__name__} without one. Use an instruction-tuned model, "
            "or keras_ebft.data.ChatTemplate with a template of your own."
        )
    adds_start = getattr(causal_lm.preprocessor, "add_start_token", True)
    return ChatTemplate(
        template,
        keep_start_token=not adds_start,
        bos_token=tokenizer.start_token,
        eos_token=tokenizer.end_token,
    )
