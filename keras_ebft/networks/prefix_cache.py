"""One pass over a document, shared by every block and sample that continues it.

The pass keeps each layer's keys and values. Generated tokens attend to them
through `strided_attention`, all at once (`read_blocks`) or one step at a time
(`BlockDecoder`).
"""

from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from keras_ebft.kernels import causal_attention, strided_attention
from keras_ebft.layout.blocks import Blocks
from keras_ebft.layout.documents import Documents
from keras_ebft.networks import RowNetwork
from keras_ebft.networks.row_reading import (
    RowDecoder,
    check_one_document_per_row,
    read_rows,
)
from keras_ebft.typing import Tensor

# `RoutedNetwork`, `RowNetwork`, or a user's own behind their interface.
Network: TypeAlias = Any


class DocumentState(NamedTuple):
    """What a network knows of a batch of documents.

    Attributes:
        outputs: the network's outputs, each `[B, T, D]`.
        keys_values: list with one `(key, value)` per layer, `[B, T, Hkv, d]`; of a
            `RowNetwork`, which has none to share, the token ids `[B, T]`.
    """

    outputs: Any
    keys_values: Any


def read_document(network: Network, documents: Documents) -> DocumentState:
    """Runs a network causally over documents.

    Rows must be padded on the right: no real token then sees padding.

    Args:
        network: `RoutedNetwork`.
        documents: `Documents`.

    Returns:
        `DocumentState`.
    """
    if isinstance(network, RowNetwork):
        check_one_document_per_row(network, documents)
        return DocumentState(network(documents.token_ids), documents.token_ids)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cache: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        output = causal_attention(query, key, value, starts=documents.starts, **options)
        return output, (key, value)

    outputs, keys_values = network(documents.token_ids, documents.positions, attend)
    return DocumentState(outputs, keys_values)


def stop_gradient(document: DocumentState) -> DocumentState:
    """The same `DocumentState`, cut off from its gradient."""
    return DocumentState(*keras.tree.map_structure(ops.stop_gradient, tuple(document)))


def read_blocks(
    network: Network, document: DocumentState, tokens: Tensor, blocks: Blocks
) -> Any:
    """Runs a network over all generated tokens of all blocks and samples.

    Args:
        network: the `RoutedNetwork` that read the document.
        document: `DocumentState`.
        tokens: int32 tensor `[B, n, K, Q]`, the first Q tokens of each block.
        blocks: `Blocks`.

    Returns:
        The network's outputs, each `[B, n, K, Q, D]`.
    """
    if isinstance(network, RowNetwork):
        return read_rows(network, document.keys_values, tokens, blocks.anchors)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: tuple[Tensor, Tensor],
        **options: Any,
    ) -> tuple[Tensor, Any]:
        output = strided_attention(
            query, key, value, *cache, blocks.anchors, starts=blocks.starts, **options
        )
        return output, None

    positions = blocks.positions(tuple(tokens.shape))
    return network(tokens, positions, attend, document.keys_values)[0]


def block_decoder(
    network: Network,
    document: DocumentState,
    blocks: Blocks,
    shape: tuple[int, ...],
    steps: int,
) -> "BlockDecoder | RowDecoder":
    """The decoder that suits a network; arguments as for `BlockDecoder`."""
    if isinstance(network, RowNetwork):
        rows = (*shape, steps)
        return RowDecoder(network, document.keys_values, blocks.anchors, rows)
    return BlockDecoder(network, document, blocks, shape, steps)


class BlockDecoder:
    """Reads one more token of every block and sample per call.

    Args:
        network: the `RoutedNetwork` that read the document.
        document: `DocumentState`.
        blocks: `Blocks`.
        shape: `(B, n, K)`.
        steps: int, tokens that will be read per block, P.
    """

    def __init__(
        self,
        network: Network,
        document: DocumentState,
        blocks: Blocks,
        shape: tuple[int, ...],
        steps: int,
    ) -> None:
        self.network = network
        self.document = document
        self.blocks = blocks
        self.shape = shape
        self.steps = steps

    def empty_caches(self) -> Any:
        """Zeros for each layer's own keys and values, `[B, n, K, P, Hkv, d]`."""
        return keras.tree.map_structure(self._empty, self.document.keys_values)

    def __call__(self, tokens: Tensor, step: Tensor, caches: Any) -> tuple[Any, Any]:
        """Reads token `step` of every block.

        Args:
            tokens: int32 tensor `[B, n, K]`.
            step: int or int scalar tensor, in `[0, P)`.
            caches: list of `(key, value)`, own keys and values so far.

        Returns:
            `(outputs, caches)`: outputs `[B, n, K, D]` and the new caches.
        """

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cache: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
            **options: Any,
        ) -> tuple[Tensor, Any]:
            (own_key, own_value), prefix = cache
            own_key = _write(own_key, key, step)
            own_value = _write(own_value, value, step)
            output = strided_attention(
                query,
                own_key,
                own_value,
                *prefix,
                self.blocks.anchors,
                starts=self.blocks.starts,
                query_offset=step,
                **options,
            )
            return output, (own_key, own_value)

        positions = self.blocks.positions((*self.shape, 1)) + step
        outputs, caches = self.network(
            tokens[..., None],
            positions,
            attend,
            list(zip(caches, self.document.keys_values)),
        )
        return keras.tree.map_structure(lambda out: out[..., 0, :], outputs), caches

    def _empty(self, document_key: Tensor) -> Tensor:
        *_, heads, width = document_key.shape
        shape = (*self.shape, self.steps, heads, width)
        return ops.zeros(shape, dtype=document_key.dtype)


def _write(cache: Tensor, update: Tensor, step: Tensor) -> Tensor:
    return ops.slice_update(cache, (0, 0, 0, step, 0, 0), update)
