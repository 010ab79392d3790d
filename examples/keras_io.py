"""
Title: Fine-tuning a language model on its own writing, without a reward model
Author: The keras_ebft authors
Date created: 2026/11/26
Last modified: 2026/11/26
Description: Energy-Based Fine-Tuning of a KerasHub causal language model with fit().
Accelerator: GPU
"""

"""
## Introduction

Supervised fine-tuning shows a language model true prefixes only: what it does after a
token of its own, it never learns. Reinforcement learning lets it write, and needs
something that says how good the writing is.

Energy-Based Fine-Tuning (EBFT,
[Jelassi et al., 2026](https://arxiv.org/abs/2603.12248)) takes the text itself.
At many places of a document the model writes a few tokens, several times. A frozen copy
of it turns what was written, and what the text really says there, into *features*:
hidden states of three of its layers. A policy gradient makes those rollouts likelier
whose features are near the text's, and so lowers the distance between the mean feature
of what the model writes and the feature of the truth.

In this example we fine-tune Gemma 3 1B with low-rank adapters on Python code, with
`keras_ebft`, which works on JAX, TensorFlow and PyTorch.
"""

"""
## Setup

The package comes with one backend of your choice:

```shell
pip install "keras_ebft[jax,data,plots]"
```
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import keras_hub

import keras_ebft

keras.utils.set_random_seed(0)

"""
## The data

Plain texts: no questions, no preferences, no scores. These are the modules of Python's
standard library; some are held out. Documents of many lengths are packed into rows of
256 tokens, so that nothing is computed for padding.
"""

LENGTH = 256
BATCH_SIZE = 4
STEPS = 100
EPOCHS = 5

causal_lm = keras_hub.models.CausalLM.from_preset("gemma3_1b", dtype="bfloat16")
tokenizer = causal_lm.preprocessor.tokenizer

rows = {
    split: keras_ebft.data.pack(
        keras_ebft.data.load("python_source", split=split), tokenizer, LENGTH
    ).load()
    for split in ("train", "validation")
}
print(rows["train"].report)

"""
## The model

Adapters come first: the frozen network is then the same weights with the adapters
switched off, and needs no memory of its own. With `bfloat16` weights adapters stay in
float32, so that small updates are not lost.

Blocks of 8 tokens start at every 8th token, and each is written 4 times. These are the
authors' settings for code. A little cross-entropy keeps likelihood from drifting.
"""

causal_lm.backbone.enable_lora(16)
model = keras_ebft.EBFTModel(
    causal_lm,
    sampler=keras_ebft.BlockSampler(
        rollout_length=8, stride=8, context_length=8, num_samples=4, temperature=0.6
    ),
    ce_weight=0.03,
    rematerialize=True,
    seed=0,
)

"""
What does the model write, before training? For each block: the truth, and each
rollout with its reward.
"""

held_out = {name: values[:8] for name, values in rows["validation"].arrays.items()}
block = model.completions(held_out, seed=0)[0]
print("truth:", repr(block["truth"]))
for rollout in block["rollouts"]:
    print(f"{rollout['reward']:.2f}", repr(rollout["text"]))

"""
## Training

`compile` takes any Keras optimizer; losses and metrics are the model's own. The value
of a policy gradient's loss is noise around 0, so the progress bar shows
`feature_matching_loss`, what is lowered, and `ce_loss`.
"""

schedule = keras.optimizers.schedules.CosineDecay(
    0.0, STEPS, alpha=0.1, warmup_target=1e-4, warmup_steps=3
)
model.compile(
    keras.optimizers.AdamW(schedule, beta_2=0.95, weight_decay=0.0, global_clipnorm=1.0)
)
before = model.evaluate(held_out, batch_size=BATCH_SIZE, return_dict=True)
history = model.fit(
    rows["train"].py_dataset(BATCH_SIZE, seed=0),
    steps_per_epoch=STEPS // EPOCHS,
    epochs=EPOCHS,
    validation_data=held_out,
    validation_batch_size=BATCH_SIZE,
)

"""
## What changed

`evaluate` draws the same random numbers each time, so that values compare.
"""

after = model.evaluate(held_out, batch_size=BATCH_SIZE, return_dict=True)
for name in ("feature_matching_loss", "alignment", "token_match", "ce_loss"):
    print(f"{name:24}{before[name]:8.4f} -> {after[name]:.4f}")
figure = keras_ebft.plots.training_curves({"EBFT": history}, before={"EBFT": before})
figure.savefig("curves.png")

"""
The trained weights are those of `causal_lm`: it generates at once, and its adapters are
a small file.
"""

print(causal_lm.generate("def fib(n):\n", max_length=64))
causal_lm.backbone.save_lora_weights("adapters.lora.h5")

"""
## Conclusion

EBFT needs text alone, and is trained by `fit` like any Keras model. Before a long run
it is worth asking whether the reward prefers better rollouts on your data
(`keras_ebft.evaluation.RewardAudit`); for tasks with a checkable answer
`keras_ebft.VerifierReward` takes its place in the same class. Compare with supervised
fine-tuning, `keras_ebft.EBFTModel.sft(causal_lm)`, whose learning rate you tuned as
well.
"""
