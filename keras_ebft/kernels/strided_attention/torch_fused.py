"""`strided_attention` in tiles of blocks, by PyTorch's fused attention on CPU."""

import functools

from keras_ebft.kernels.strided_attention.blockwise import strided_attention_blockwise
from keras_ebft.kernels.torch_fused_attention import fused_tile_attention

strided_attention_fused = functools.partial(
    strided_attention_blockwise, attend=fused_tile_attention
)
