"""Feature network and reference model: the networks beside the policy.

Where both are the model as it was at the start, they are one copy: features are
tapped on the way to the reference's logits.
"""

from keras import ops

from keras_ebft.layout.documents import take_tokens
from keras_ebft.networks import (
    adapters,
    copied_variables,
    frozen_taps,
    leading,
    num_layers,
    output_head,
)
from keras_ebft.networks.prefix_cache import read_blocks, read_document


class FrozenNetworks:
    """Feature network and reference model of one policy.

    Args:
        feature_network: `FeatureNetwork`.
        backbone: the policy's backbone.
        needs_features: bool, whether a feature network is made.
        needs_reference: bool, whether a reference model is made.
        learns: bool, whether a critic trains the feature network.
        rematerialize: bool, whether the decoder layers of a feature network that
            learns run again in the backward pass.
    """

    def __init__(
        self,
        feature_network,
        backbone,
        needs_features,
        needs_reference,
        learns=False,
        rematerialize=False,
    ):
        self.feature_network = feature_network
        self.taps = self.reference = None
        if learns:
            _refuse_adapters(backbone)
        depth = num_layers(backbone)
        shared = feature_network.is_initial_model and not learns
        if needs_features and needs_reference and shared:
            layers = feature_network.tapped_layers(depth)
            self.num_taps = len(layers)
            layers = sorted({*layers, depth})
            self.taps = self.reference = frozen_taps(backbone, layers, with_head=True)
            return
        if needs_features:
            self.taps = feature_network.freeze(backbone)
            self.num_taps = None
            if learns:
                self.taps.model.trainable = True
                self.taps.rematerialize = rematerialize
        if needs_reference:
            self.reference = frozen_taps(
                backbone,
                [depth],
                with_head=True,
                name="reference_network",
            )

    @property
    def has_reference(self):
        """Whether there is a reference model."""
        return self.reference is not None

    @property
    def models(self):
        """The Keras models, each once, that hold frozen variables."""
        return [n.model for n in self._networks() if n.model is not None]

    def read(self, documents):
        """What the networks know of documents: a `DocumentState` each."""
        networks = self._networks()
        return [read_document(network, documents) for network in networks]

    def outputs(self, states, rollout_ids, blocks):
        """What the networks say about documents and rollouts.

        Args:
            states: list from `read`.
            rollout_ids: int32 tensor `[B, n, K, G]`.
            blocks: `Blocks`.

        Returns:
            dict from a network's id to `(document outputs, rollout outputs)`, lists
            of `[B, T, D]` and `[B, n, K, G, D]`.
        """
        found = {}
        for network, state in zip(self._networks(), states):
            generated = read_blocks(network, state, rollout_ids, blocks)
            found[id(network)] = (_as_list(state.outputs), _as_list(generated))
        return found

    def _networks(self):
        networks = {id(n): n for n in (self.taps, self.reference) if n is not None}
        return list(networks.values())

    def features(self, outputs, token_mask, alive):
        """Features of rollouts; see `FeatureNetwork.generated`."""
        _, generated = outputs[id(self.taps)]
        generated = generated[: self.num_taps]
        return self.feature_network.generated(generated, token_mask, alive)

    def true_features(self, states, blocks):
        """Features of true continuations; see `FeatureNetwork.target`."""
        state = states[self._networks().index(self.taps)]
        taps = _as_list(state.outputs)[: self.num_taps]
        return self.feature_network.target(taps, blocks)

    def reference_hidden(self, outputs, blocks):
        """Final hidden states that predict each generated token, `[B, n, K, G, D]`."""
        document, generated = outputs[id(self.reference)]
        before = take_tokens(document[-1], blocks.anchors - 1)
        samples = generated[-1].shape[1]
        first = ops.repeat(before[:, None, :, None, :], samples, axis=1)
        return ops.concatenate([first, generated[-1][..., :-1, :]], axis=-2)

    def reference_head(self):
        """`OutputHead` of the reference model."""
        return output_head(self.reference.backbone)

    def follow(self, backbone):
        """Moves the feature network towards the policy (`ema_decay`)."""
        decay = self.feature_network.ema_decay
        pairs = copied_variables(self.taps.model, backbone)
        for frozen, trained in pairs:
            old = ops.convert_to_tensor(frozen)
            new = leading(ops.convert_to_tensor(trained), old.shape)
            frozen.assign(decay * old + (1.0 - decay) * ops.cast(new, old.dtype))


def _refuse_adapters(backbone):
    if adapters.adapted_layers(backbone):
        raise ValueError(
            "Expected a model without adapters with Critic(train_features=True): its "
            "feature network is its own base, which does not move. Received: a "
            f"{type(backbone).__name__} with adapters. Leave one of them out."
        )


def _as_list(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def refuse_shared_paths(networks, causal_lm):
    """Raises a `ValueError` if two networks' variables have the same path.

    Keras finds a PyTorch parameter by its variable's path: of two with one path
    only one would be kept.
    """
    trained = {variable.path for variable in causal_lm.variables}
    own = {id(variable) for variable in causal_lm.variables}
    for model in networks.models:
        frozen = [v for v in model.variables if id(v) not in own]
        shared = sorted(trained & {variable.path for variable in frozen})
        if shared:
            raise ValueError(
                "Expected the feature network's variables to have paths of their own. "
                f"Received: {len(shared)} paths that the policy has too, such as "
                f"{shared[0]!r}. Build the network within keras.name_scope("
                '"feature_network").'
            )
