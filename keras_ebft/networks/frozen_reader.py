"""The networks beside the policy: where features and the reference come from."""

from collections.abc import Sequence
from typing import Any, cast

import keras
import keras_hub
from keras import ops

from keras_ebft.layout.blocks import Blocks
from keras_ebft.layout.documents import Documents, take_tokens
from keras_ebft.networks import (
    OutputHead,
    adapters,
    copied_variables,
    leading,
    num_layers,
    output_head,
)
from keras_ebft.networks.from_backbone import frozen_taps
from keras_ebft.networks.prefix_cache import (
    DocumentState,
    Network,
    read_blocks,
    read_document,
)
from keras_ebft.typing import Tensor


class FrozenReader:
    """A frozen network that knows which of its outputs are what.

    Args:
        network: network whose outputs are a list of hidden states (or, of a
            callable, its features).
        tap_slots: tuple of ints, the outputs that features are made of.
        reference_slot: int, the output that the initial model's logits come from;
            `None` if it is no reference.
    """

    def __init__(
        self,
        network: Network,
        tap_slots: Sequence[int] = (),
        reference_slot: int | None = None,
    ) -> None:
        self.network = network
        self.tap_slots = tuple(tap_slots)
        self.reference_slot = reference_slot

    @property
    def model(self) -> keras.Model | None:
        """The `keras.Model` that holds the variables; `None` for a function."""
        return self.network.model

    def read(self, documents: Documents) -> DocumentState:
        """`DocumentState` of documents."""
        return read_document(self.network, documents)

    def continued(
        self, state: DocumentState, token_ids: Tensor, blocks: Blocks
    ) -> list[Tensor]:
        """The network's outputs for rollouts.

        Args:
            state: what `read` returned.
            token_ids: int32 tensor `[B, n, K, G]`.
            blocks: `Blocks`.

        Returns:
            list of `[B, n, K, G, D]`.
        """
        return _as_list(read_blocks(self.network, state, token_ids, blocks))

    def taps(self, outputs: Any) -> list[Tensor]:
        """The outputs that features are made of."""
        outputs = _as_list(outputs)
        return [outputs[slot] for slot in self.tap_slots]

    def reference_hidden(
        self, state: DocumentState, outputs: list[Tensor], blocks: Blocks
    ) -> Tensor:
        """Final hidden states that predict each generated token.

        Args:
            state: what `read` returned.
            outputs: what `continued` returned.
            blocks: `Blocks`.

        Returns:
            float tensor `[B, n, K, G, D]`.
        """
        slot = cast(int, self.reference_slot)
        generated = outputs[slot]
        document = _as_list(state.outputs)[slot]
        before = take_tokens(document, blocks.anchors - 1)
        first = ops.repeat(before[:, None, :, None, :], generated.shape[1], axis=1)
        return ops.concatenate([first, generated[..., :-1, :]], axis=-2)

    def reference_head(self) -> OutputHead:
        """`OutputHead` of the initial model."""
        return output_head(self.network.backbone)

    def learn(self, rematerialize: bool) -> None:
        """Lets a critic train the network.

        Args:
            rematerialize: bool, whether its decoder layers run again in the backward
                pass.
        """
        self.network.model.trainable = True
        self.network.rematerialize = rematerialize

    def follow(self, backbone: keras_hub.models.Backbone, decay: float) -> None:
        """Moves the network towards the policy: `decay * own + (1 - decay) * policy`.

        Args:
            backbone: the policy's backbone, which the network is a copy of.
            decay: float in [0, 1).
        """
        for own, trained in copied_variables(self.model, backbone):
            # In half precision the two factors would not add up to 1.
            dtype = keras.backend.result_type(own.dtype, "float32")
            old = ops.cast(ops.convert_to_tensor(own), dtype)
            # On JAX this runs within what is differentiated.
            new = ops.stop_gradient(ops.convert_to_tensor(trained))
            new = ops.cast(leading(new, old.shape), dtype)
            own.assign(ops.cast(decay * old + (1.0 - decay) * new, own.dtype))


def frozen_readers(
    feature_network: Any,
    backbone: keras_hub.models.Backbone,
    *,
    features: bool,
    reference: bool,
    live: bool = False,
) -> tuple[FrozenReader | None, FrozenReader | None]:
    """The readers of features and of the reference model.

    Where both are the model as it is now they are one copy, tapped on the way to
    the reference's logits.

    Args:
        feature_network: `FeatureNetwork`.
        backbone: the policy's backbone.
        features: bool, whether features are needed.
        reference: bool, whether a reference model is needed.
        live: bool, whether a critic trains the feature network.

    Returns:
        `(feature reader, reference reader)`, `None` for what is not needed.

    Raises:
        ValueError: if the feature network cannot be made, or not be trained.
    """
    if live:
        _refuse_adapters(backbone)
    shared = features and reference and feature_network.is_initial_model and not live
    if shared:
        reader = feature_network.freeze(backbone, with_reference=True)
        return reader, reader
    feature_reader = feature_network.freeze(backbone) if features else None
    return feature_reader, _reference_reader(backbone) if reference else None


def _reference_reader(backbone: keras_hub.models.Backbone) -> FrozenReader:
    network = frozen_taps(
        backbone, [num_layers(backbone)], with_head=True, name="reference_network"
    )
    return FrozenReader(network, reference_slot=0)


def _refuse_adapters(backbone: keras_hub.models.Backbone) -> None:
    if adapters.adapted_layers(backbone):
        raise ValueError(
            "Expected a model without adapters with Critic(train_features=True): its "
            "feature network is its own base, which does not move. Received: a "
            f"{type(backbone).__name__} with adapters. Leave one of them out."
        )


def refuse_shared_paths(
    models: Sequence[keras.Model], causal_lm: keras_hub.models.CausalLM
) -> None:
    """Raises a `ValueError` if two networks' variables have the same path.

    Keras finds a PyTorch parameter by its variable's path: of two with one path
    only one would be kept.

    Args:
        models: list of `keras.Model`, the frozen networks.
        causal_lm: `keras_hub.models.CausalLM`, the policy.
    """
    trained = {variable.path for variable in causal_lm.variables}
    own = {id(variable) for variable in causal_lm.variables}
    for model in models:
        frozen = [v for v in model.variables if id(v) not in own]
        shared = sorted(trained & {variable.path for variable in frozen})
        if shared:
            raise ValueError(
                "Expected the feature network's variables to have paths of their own. "
                f"Received: {len(shared)} paths that the policy has too, such as "
                f"{shared[0]!r}. Build the network within keras.name_scope("
                '"feature_network").'
            )


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
