"""A feature network of the user's own, behind the interface of `RoutedNetwork`."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ebft.typing import Tensor


class CallableNetwork:
    """A callable whose attention is supplied, on documents and on rollouts.

    Args:
        function: callable `(token_ids, positions, attend=...)` that returns per-token
            features `[..., D]` or `[..., F, D]`; see `FeatureNetwork`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.model = function if isinstance(function, keras.Layer) else None
        if self.model is not None:
            self.model.trainable = False

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Callable[..., Any],
        caches: list[Any] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Runs the function; see `RoutedNetwork.__call__`.

        Raises:
            ValueError: if the function attended more or less often over rollouts
                than over documents, or returned features of another shape.
        """
        updated: list[Any] = []

        def routed(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *,
            scale: float,
            sliding_window: int | None = None,
            soft_cap: float | None = None,
        ) -> Tensor:
            if caches is not None and len(updated) >= len(caches):
                raise ValueError(
                    "Expected the feature network to call `attend` as often over "
                    f"rollouts as over documents, {len(caches)} times. Received: "
                    "more calls. Make its layers the same for every shape."
                )
            output, cache = attend(
                query,
                key,
                value,
                None if caches is None else caches[len(updated)],
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
            )
            updated.append(cache)
            return output

        features = ops.convert_to_tensor(
            self.function(token_ids, positions, attend=routed)
        )
        if caches is not None and len(updated) != len(caches):
            raise ValueError(
                "Expected the feature network to call `attend` as often over "
                f"rollouts as over documents, {len(caches)} times. Received: "
                f"{len(updated)} calls. Make its layers the same for every shape."
            )
        return _with_feature_axis(features, token_ids), updated


def _with_feature_axis(features: Tensor, token_ids: Tensor) -> Tensor:
    lead = tuple(token_ids.shape)
    shape = tuple(features.shape)
    if len(shape) == len(lead) + 1:
        features, shape = features[..., None, :], (*shape[:-1], 1, shape[-1])
    if len(shape) != len(lead) + 2 or shape[: len(lead)] != lead:
        raise ValueError(
            "Expected the feature network to return features [..., D] or [..., F, D] "
            f"for token ids of shape {list(lead)}. Received: shape {list(shape)}."
        )
    return features
