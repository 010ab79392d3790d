"""One step of the paper authors' code, from a checkout of theirs, phase by phase.

Nothing of it is here: `load` imports it, the rest calls it as its trainer does, without
the cluster around it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

# What the checkout imports for GPUs and clusters, and no phase of a step runs.
ABSENT = ("flash_attn", "deepspeed", "ray", "vllm", "comet", "bitsandbytes")
# Without these their code takes a plain way of its own.
OPTIONAL = ("flash_attn.ops",)


class _Absent(types.ModuleType):
    """A module that can be imported from, but not used."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_, **__):
            raise RuntimeError(f"{self.__name__}.{name} is not installed")

        return absent


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] not in ABSENT or name.startswith(OPTIONAL):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


def load(checkout):
    """The authors' classes and functions that a step is made of, by name."""
    # Before the finder, so that these see what is really installed.
    import peft  # noqa: F401
    import transformers  # noqa: F401

    sys.meta_path.insert(0, _AbsentFinder())
    sys.path.insert(0, str(checkout))
    from inference_loss.strided_actor import StridedActorModel
    from inference_loss.strided_critic import StridedCriticModel
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import EBFTPolicyLoss
    from openrlhf.models.utils import build_strided_attention_mask_and_positions
    from openrlhf.utils import embedding_utils

    return types.SimpleNamespace(
        sampler=StridedActorModel,
        critic=StridedCriticModel,
        actor=Actor,
        loss=EBFTPolicyLoss,
        mask=build_strided_attention_mask_and_positions,
        rewards=embedding_utils,
    )


class ReferenceStep:
    """The phases of a step as their trainer runs them on one worker.

    Args:
        checkout: path of the authors' repository.
        folder: model in Hugging Face layout.
        shape: dict, see `step.DEFAULTS`.
        tokens: int array `[B, T]`.
        attention: str, `"eager"` as their trainer loads models, or `"sdpa"`,
            PyTorch's fused attention.
        device: str, where everything lies.
    """

    def __init__(self, checkout, folder, shape, tokens, attention, device="cpu"):
        import torch
        from transformers import AutoModelForCausalLM

        self.theirs = load(checkout)
        self.shape = shape
        self.device = device
        self.dtype = getattr(torch, shape["dtype"])
        self.prompts = torch.tensor(tokens, dtype=torch.long, device=device)
        length = self.prompts.shape[1] - shape["rollout"] - shape["context"]
        self.blocks = length // shape["stride"] + 1

        def model():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.dtype, attn_implementation=attention
            ).to(device)

        policy = model()
        self.actor = self.theirs.actor(policy, temperature=0.6)
        self.sampler = self._bare(self.theirs.sampler, policy)
        self.critic = self._bare(
            self.theirs.critic, model().model.requires_grad_(False)
        )
        self.loss = self.theirs.loss("ppo")
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0)

    def _bare(self, owner, model):
        """An object of theirs on a model at hand, without its own loading."""
        made = object.__new__(owner)
        made.model, made.device, made.dtype = model, self.device, self.dtype
        return made

    def rollout(self):
        """Full sequences `[B n, T + G K]`, generated tokens step by step."""
        import torch

        shape = self.shape
        return self.sampler.generate_samples(
            self.prompts,
            torch.zeros_like(self.prompts),
            torch.ones_like(self.prompts),
            n_samples_per_prompt=shape["samples"],
            generate_max_len=shape["rollout"],
            context_length=shape["context"],
            stride=shape["stride"],
            temperature=0.6,
        ).full_sequences

    def sequences(self, rollouts):
        """Full sequences of given rollouts `[B, n, K, G]`."""
        import torch

        batch, samples = rollouts.shape[:2]
        generated = torch.tensor(rollouts, dtype=torch.long, device=self.device)
        generated = generated.transpose(2, 3)
        generated = generated.reshape(batch * samples, -1)
        prompts = self.prompts.repeat_interleave(samples, dim=0)
        return torch.cat([prompts, generated], dim=1)

    def features(self, sequences):
        """Features of rollouts and truth at the last token, `[1, B, n, K, D]`."""
        shape = self.shape
        import torch

        gen, true = self.critic.extract_gt_and_gen_embeddings(
            sequences,
            self.prompts.shape[1],
            shape["context"],
            shape["rollout"],
            shape["stride"],
            self.blocks,
            hidden_state_method="concat",
            doc_ids=torch.zeros_like(sequences),
            qa_masks=torch.ones_like(sequences),
        )
        axes = (1, -1, shape["samples"], self.blocks)
        return tuple(v[:, :, -1].reshape(*axes, v.shape[-1]) for v in (gen, true))

    def rewards(self, generated, true):
        """Advantages `[B n, K]`, leave-one-out."""
        theirs, samples = self.theirs.rewards, self.shape["samples"]
        generated, true = theirs.whiten_embeddings_batched(generated, true)
        alignment = 2.0 * theirs.get_alignment_rewards(generated, true)
        diversity = 2.0 * theirs.get_diversity_rewards(generated)
        others = alignment.sum(2, keepdim=True) - alignment
        baseline = others / (samples - 1)
        rest = diversity.sum(2, keepdim=True) - 2.0 * diversity
        baseline = baseline - rest / (samples - 2)
        return (alignment - diversity - baseline).reshape(-1, self.blocks)

    def log_prob(self, sequences):
        """Log-probabilities `[B n, T + G K - 1]`, of the document first."""
        shape = self.shape
        import torch

        length = self.prompts.shape[1]
        mask, positions = self.theirs.mask(
            full_sequence_length=sequences.shape[1],
            prompt_length=length,
            context_length=shape["context"],
            generation_step=shape["rollout"],
            max_generation_length=shape["rollout"],
            stride=shape["stride"],
            num_blocks=self.blocks,
            device=self.device,
            doc_ids=torch.zeros(
                sequences.shape[0], length, dtype=torch.long, device=self.device
            ),
            dtype=self.dtype,
        )
        return self.actor(
            sequences,
            attention_mask=mask,
            pos_ids=positions,
            return_logprobs=True,
            prompt_len=length,
            context_len=shape["context"],
            num_blocks=self.blocks,
            stride=shape["stride"],
        )

    def policy(self, sequences, advantages):
        """Gradient of the policy loss; returns log-probabilities."""
        import torch

        log_prob = self.log_prob(sequences)
        generated = torch.zeros_like(log_prob, dtype=torch.bool)
        length = self.prompts.shape[1]
        generated[:, length - 1 :] = True
        per_token = torch.zeros_like(log_prob)
        per_token[:, length - 1 :] = advantages.repeat(1, self.shape["rollout"])
        counts = torch.ones_like(generated)
        loss, _ = self.loss(log_prob, per_token, generated, counts)
        loss.backward()
        return log_prob.detach()

    def update(self):
        """The optimizer's update."""
        self.optimizer.step()
        self.optimizer.zero_grad()
