"""Attention with the relative positions of Transformer-XL (Dai et al. 2019, ACL, section 3.3 and appendix B).

Letters: B batch, H heads, T queries, M memory, S = M + T keys, K channels of a head, D channels of the model.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def sinusoidal_positions(num_positions: int, d_model: int, *, like: Tensor) -> Tensor:
    """Return encodings of the distances `num_positions - 1, ..., 1, 0`, `(S, D)`: sines, then cosines.

    Args:
        num_positions: Number of distances, S.
        d_model: Number of channels, D.
        like: Tensor whose dtype and device the encodings get.

    Raises:
        ValueError: `d_model` is odd.
    """
    if d_model % 2:
        raise ValueError(f"d_model={d_model!r} must be even: half of the position encoding is sines, half cosines")
    dtype = torch.promote_types(like.dtype, torch.float32)  # sixteen bits cannot count far
    distances = torch.arange(num_positions - 1, -1, -1, dtype=dtype, device=like.device)
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=dtype, device=like.device) / d_model)
    angles = torch.outer(distances, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)  # (S, D)


def causal_mask(num_queries: int, num_keys: int, *, window: int | None = None, like: Tensor) -> Tensor:
    """Return the additive mask `(T, S)` of causal attention, whose queries are the last `num_queries` keys.

    Args:
        num_queries: Number of queries, T.
        num_keys: Number of keys, S.
        window: The mask is `-inf` where a key lies this many positions or more before its query; None for no limit.
            It is always `-inf` where a key lies after its query.
        like: Tensor whose dtype and device the mask gets.
    """
    mask = torch.full((num_queries, num_keys), -torch.inf, dtype=like.dtype, device=like.device)
    own = num_keys - num_queries
    allowed = mask.triu(1 + own)
    return allowed if window is None else allowed + mask.tril(own - window)


def relative_shift(scores: Tensor) -> Tensor:
    """Return scores by key from scores by distance, `(B, H, T, S)`: row `i` shifts left by `T - 1 - i`.

    Column `s` of the argument belongs to the distance `S - 1 - s`. Entries after the query's own position are without
    meaning, and have to be masked.
    """
    batch_size, num_heads, num_queries, num_keys = scores.shape
    padded = pad(scores, (1, 0)).reshape(batch_size, num_heads, num_keys + 1, num_queries)
    return padded[:, :, 1:].reshape(batch_size, num_heads, num_queries, num_keys)  # (B, H, T, S)


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention with logits `((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(K)`, `(B, H, T, K)`.

    Args:
        query: `(B, H, T, K)`.
        key: `(B, H, S, K)`.
        value: `(B, H, S, K)`.
        position: Keys `r` of the distances `S - 1 ... 0`, `(H, S, K)`.
        content_bias: `u`, `(H, 1, K)`.
        position_bias: `v`, `(H, 1, K)`.
        mask: Additive mask, `(T, S)` or `(B, 1, T, S)`.
    """
    scale = query.shape[-1] ** -0.5
    by_distance = ((query + position_bias) * scale) @ position.mT  # (B, H, T, S)
    bias = relative_shift(by_distance) + mask
    return scaled_dot_product_attention(query + content_bias, key, value, attn_mask=bias)


def single_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    earlier_key: Tensor,
    earlier_value: Tensor,
    earlier_bias: Tensor,
    bias: Tensor,
) -> Tensor:
    """Attention of one query over M earlier positions and its own, with logits `q . k_j / sqrt(K) + b_j`.

    With `q = q_i + u`, `k_j + r_{i-j}` for the key and `b_j = (v - u) . r_{i-j} / sqrt(K)` it is `relative_attention`
    of its last query, in half as many operations. Earlier keys and values are not joined with those of the query's
    position, which would copy all of them in every evaluation of a map. Shapes, with N = B H:

    Args:
        query: `(N, 1, K)`.
        key: Of the query's position, `(N, 1, K)`.
        value: Of the query's position, `(N, 1, K)`.
        earlier_key: `(N, M, K)`.
        earlier_value: `(N, M, K)`.
        earlier_bias: `(N, 1, M)`.
        bias: Of the query's position, `(N, 1, 1)`.
    """
    scale = query.shape[-1] ** -0.5
    earlier = torch.baddbmm(earlier_bias, query, earlier_key.mT, alpha=scale)  # (N, 1, M)
    own = torch.baddbmm(bias, query, key.mT, alpha=scale)  # (N, 1, 1)
    earlier, own = torch.cat([earlier, own], dim=2).softmax(dim=2).split([earlier.shape[2], 1], dim=2)
    return torch.baddbmm(own * value, earlier, earlier_value)  # (N, 1, K)
