"""What a training step will need, before a model is loaded: memory and work.

Bytes of variables are exact for the families that `DecoderShape` describes, and a
test holds them against built models. What a step keeps for its gradient was counted
on PyTorch, token by token, and the same test holds the coefficients.
"""

import dataclasses

from keras_ebft.backend.runtime import backend_name
from keras_ebft.samplers import BlockSampler
from keras_ebft.validation import (
    check_bool,
    check_choice,
    check_instance,
    check_int,
    check_micro_batches,
    check_number,
)

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder with gated feed-forward layers: Llama, Mistral, Qwen, Gemma.

    Norms of queries and keys, biases and second norms of a layer are left out: less
    than a thousandth.

    Attributes:
        num_layers: int.
        hidden_dim: int, width D.
        intermediate_dim: int, width of the feed-forward layers.
        num_query_heads: int.
        num_key_value_heads: int.
        head_dim: int.
        vocabulary_size: int.
        tied: bool, whether the embeddings are the output head, too.
    """

    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary_size: int
    tied: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "tied":
                check_bool(field.name, value)
            else:
                check_int(field.name, value, 1)

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings, an int."""
        return self.vocabulary_size * self.hidden_dim

    @property
    def projections(self) -> int:
        """Weights of one layer's matrices, an int."""
        heads = self.num_query_heads + self.num_key_value_heads
        attention = 2 * self.hidden_dim * heads * self.head_dim
        return attention + 3 * self.hidden_dim * self.intermediate_dim

    @property
    def parameters(self) -> int:
        """All weights, an int."""
        norms = (2 * self.num_layers + 1) * self.hidden_dim
        head = 0 if self.tied else self.embeddings
        layers = self.num_layers * self.projections
        return self.embeddings + head + layers + norms

    def adapter_parameters(self, rank: int) -> int:
        """Weights of KerasHub's adapters on queries and values, an int.

        Args:
            rank: int. Each head has its own `[hidden_dim, rank]` matrix.
        """
        heads = self.num_query_heads + self.num_key_value_heads
        one_layer = heads * self.hidden_dim + 2 * self.head_dim
        return self.num_layers * rank * one_layer


# From their published configurations: Llama 3.2 1B, Qwen2.5 7B, Gemma 3 27B.
SHAPES = {
    "1B": DecoderShape(16, 2048, 8192, 32, 8, 64, 128256),
    "7B": DecoderShape(28, 3584, 18944, 28, 4, 128, 152064, tied=False),
    "27B": DecoderShape(62, 5376, 21504, 32, 16, 128, 262144),
}

# Bytes that a token's pass keeps for its gradient: per layer and unit of the
# feed-forward's, the model's and the keys' width, and after all layers per unit of
# the model's. Counted on PyTorch with Llamas of eight sizes, within 2 %.
KEPT = {
    ("float32", False): (15.7, 41.0, 10.0, 15.1),
    ("float32", True): (11.3, 31.5, 9.1, 0.0),
    ("bfloat16", False): (9.9, 28.6, 5.1, 11.7),
    ("bfloat16", True): (7.7, 19.9, 4.7, 0.0),
}
POLICIES = ("float32", "bfloat16", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs, by what they are for.

    Attributes:
        policy: weights of the model that is trained, adapters included.
        frozen: the copy that features are read from; 0 with adapters.
        optimizer: its variables.
        gradients: of the trained weights.
        casts: weights in half precision beside float32 ones (mixed policies).
        activations: what the backward pass needs of the forward passes.
        update: copies of adapters and their slots while an update is applied, on
            TensorFlow and PyTorch. Large weights need none, except for optimizers
            that have to see all of a weight: Adafactor, Lamb and Muon.
    """

    policy: int
    frozen: int
    optimizer: int
    gradients: int
    casts: int
    activations: int
    update: int

    @property
    def total(self) -> int:
        """The most at one time, an int: activations are gone when an update begins."""
        always = self.policy + self.frozen + self.optimizer + self.gradients
        return always + max(self.activations + self.casts, self.update)

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)] + ["total"]
        return ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in names)


def memory(
    shape: DecoderShape,
    length: int = 1024,
    batch_size: int = 16,
    *,
    sampler: BlockSampler | None = None,
    dtype: str = "mixed_bfloat16",
    lora_rank: int | None = None,
    rematerialize: bool = False,
    micro_batches: int = 1,
    feature_depth: float = 0.75,
    optimizer_slots: int = 2,
    backend: str | None = None,
) -> MemoryEstimate:
    """What one training step needs, in bytes.

    An estimate from above for what compilers and kernels may fuse; a framework's own
    memory (a gigabyte, and what a GPU's libraries take) comes on top.

    Args:
        shape: `DecoderShape`.
        length: int, tokens per row.
        batch_size: int, rows.
        sampler: `BlockSampler`, by default the paper's for code.
        dtype: `"float32"`, `"bfloat16"` or `"mixed_bfloat16"`, of the backbone.
        lora_rank: int or `None`, of adapters on queries and values.
        rematerialize: bool, as in `EBFTModel`.
        micro_batches: int, as in `EBFTModel`.
        feature_depth: float, how far up the frozen copy goes, as a share of the
            layers: the highest of `FeatureNetwork`'s `layers`; 1 with a `kl_weight`.
        optimizer_slots: int, variables of the optimizer per weight: 2 for Adam.
        backend: `"jax"`, `"tensorflow"` or `"torch"`, by default Keras' own.

    Returns:
        `MemoryEstimate`.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    ```python
    shape = keras_ebft.estimates.SHAPES["7B"]
    print(keras_ebft.estimates.memory(shape, batch_size=1, lora_rank=16))
    ```
    """
    _check_shape(shape)
    check_choice("dtype", dtype, POLICIES)
    check_bool("rematerialize", rematerialize)
    feature_depth = check_number("feature_depth", feature_depth, 0.0, 1.0)
    slots = check_int("optimizer_slots", optimizer_slots, 0)
    backend = check_choice(
        "backend", backend or backend_name(), ("jax", "tensorflow", "torch")
    )
    sampler = _settled(sampler)
    check_micro_batches(micro_batches, sampler.num_samples)
    documents, rollouts = _counted(sampler, length, batch_size)
    # A block's last token is scored and never read.
    read = rollouts * (sampler.rollout_length - 1)
    width = 2 if dtype == "bfloat16" else 4
    trained, frozen, adapters = shape.parameters * width, 0, 0
    if lora_rank is None:
        depth = max(1, int(feature_depth * shape.num_layers))
        frozen = _frozen_weights(shape, depth) * width
    else:
        # Keras keeps adapters in float32.
        adapters = 4 * shape.adapter_parameters(check_int("lora_rank", lora_rank, 1))
        trained = adapters
    optimizer = slots * trained
    return MemoryEstimate(
        policy=shape.parameters * width + adapters,
        frozen=frozen,
        optimizer=optimizer,
        gradients=trained,
        # Once for the documents' pass and once for the rollouts'.
        casts=4 * shape.parameters if dtype == "mixed_bfloat16" else 0,
        activations=_activations(
            shape,
            (documents, read),
            ("float32" if dtype == "float32" else "bfloat16", lora_rank is not None),
            rematerialize,
            micro_batches,
        ),
        update=0 if backend == "jax" or lora_rank is None else trained + optimizer,
    )


def _check_shape(shape: DecoderShape) -> None:
    remedy = "Take one of `keras_ebft.estimates.SHAPES`, or make one."
    check_instance("shape", shape, DecoderShape, remedy)


def _settled(sampler: BlockSampler | None) -> BlockSampler:
    """The sampler that is meant."""
    sampler = BlockSampler() if sampler is None else sampler
    remedy = "Pass the model's own, or None for the paper's settings."
    return check_instance("sampler", sampler, BlockSampler, remedy)


def _counted(sampler: BlockSampler, length: int, batch_size: int) -> tuple[int, int]:
    """Tokens of a batch's documents, and how many rollouts they carry."""
    length = check_int("length", length, 1)
    batch_size = check_int("batch_size", batch_size, 1)
    blocks = sampler.num_anchors or 1
    if sampler.anchors == "stride":
        blocks = sampler.geometry(length).num_blocks
    return batch_size * length, batch_size * sampler.num_samples * blocks


def _frozen_weights(shape: DecoderShape, depth: int) -> int:
    """Weights of the frozen copy up to its highest tap."""
    norms = 2 * depth * shape.hidden_dim
    last_norm = shape.hidden_dim if depth == shape.num_layers else 0
    return shape.embeddings + depth * shape.projections + norms + last_norm


def _activations(
    shape: DecoderShape,
    tokens: tuple[int, int],
    kind: tuple[str, bool],
    rematerialize: bool,
    micro_batches: int,
) -> int:
    """What is kept for the backward pass, and made again within it."""
    documents, rollouts = tokens
    model_width = max(shape.hidden_dim, shape.num_query_heads * shape.head_dim)
    keys = shape.num_key_value_heads * shape.head_dim
    per_unit, per_width, per_key, after = KEPT[kind]
    one_layer = per_unit * shape.intermediate_dim
    one_layer += per_width * model_width + per_key * keys
    width = 4 if kind[0] == "float32" else 2
    kept, layers = one_layer, shape.num_layers
    if rematerialize:
        # Inputs, keys and values stay; a layer at a time is made again.
        kept = width * (shape.hidden_dim + 2 * keys)
    per_token = layers * kept + rematerialize * one_layer + after * shape.hidden_dim
    # Of groups of samples one is there at a time.
    return round(per_token * (documents + rollouts / micro_batches))


@dataclasses.dataclass(frozen=True)
class WorkEstimate:
    """Floating-point operations of one training step, by phase.

    Attributes:
        documents: the policy reads each document, once.
        rollouts: sampling.
        features: the frozen copy reads documents and rollouts.
        policy: scores of the rollouts, and the backward pass through both.
    """

    documents: float
    rollouts: float
    features: float
    policy: float

    @property
    def total(self) -> float:
        """All phases, a float."""
        return self.documents + self.rollouts + self.features + self.policy

    def seconds(self, operations_per_second: float, utilization: float = 0.3) -> float:
        """How long a step takes, a float.

        Args:
            operations_per_second: float, what the device does at most, in the dtype
                of the matrix products.
            utilization: float in (0, 1], the share of it that training reaches: an
                assumption until you have measured a step of yours.
        """
        check_number("operations_per_second", operations_per_second, 1.0)
        check_number("utilization", utilization, 1e-6, 1.0)
        return self.total / (operations_per_second * utilization)


def work(
    shape: DecoderShape,
    length: int = 1024,
    batch_size: int = 16,
    *,
    sampler: BlockSampler | None = None,
    rematerialize: bool = False,
    ce_weight: float = 0.0,
    feature_depth: float = 0.75,
) -> WorkEstimate:
    """Operations of one training step, without attention's own products.

    Those are a few percent where rows are short beside the model's width. With
    adapters the backward pass is up to half as long.

    Args:
        shape: `DecoderShape`.
        length: int, tokens per row.
        batch_size: int, rows.
        sampler: `BlockSampler`, by default the paper's for code.
        rematerialize: bool, as in `EBFTModel`.
        ce_weight: float, as in `EBFTModel`; anything but 0 scores documents, too.
        feature_depth: float, how far up the frozen copy is read.

    Returns:
        `WorkEstimate`.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    Example:
    ```python
    work = keras_ebft.estimates.work(keras_ebft.estimates.SHAPES["1B"])
    work.seconds(400e12)
    ```
    """
    _check_shape(shape)
    check_bool("rematerialize", rematerialize)
    feature_depth = check_number("feature_depth", feature_depth, 0.0, 1.0)
    ce_weight = check_number("ce_weight", ce_weight, 0.0)
    sampler = _settled(sampler)
    documents, rollouts = _counted(sampler, length, batch_size)
    generated = rollouts * sampler.rollout_length
    read = generated - rollouts
    layers = 2.0 * shape.num_layers * shape.projections
    head = 2.0 * shape.embeddings
    backward = 2 + rematerialize
    scored = generated + (documents if ce_weight else 0)
    return WorkEstimate(
        documents=documents * layers,
        rollouts=read * layers + generated * head,
        features=feature_depth * (documents + generated) * layers,
        policy=(read + backward * (documents + read)) * layers + 4 * scored * head,
    )
