"""`causal_attention` by PyTorch's own fused attention."""

from torch.nn.functional import scaled_dot_product_attention


def causal_attention_fused(
    query, key, value, *, scale, starts=None, sliding_window=None, soft_cap=None
):
    """See `keras_ebft.kernels.causal_attention`; rows of one document, no options."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    output = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1
    )
    return output.transpose(1, 2)
