"""Sigmoid attention by its definition: the plain form that every other form is compared with.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor


def visible_pairs(
    queries: int, keys: int, *, causal: bool, segment_ids_BT: Tensor | None, device: torch.device
) -> Tensor:
    """Which (query, key) pairs may meet, as bool (1 or B, 1, T, S).

    Queries are the last `queries` of `keys` positions (bottom-right alignment), as in decoding.
    """
    query_T1 = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key_1S = torch.arange(keys, device=device)[None, :]
    visible = (key_1S <= query_T1) if causal else torch.ones_like(key_1S <= query_T1)
    visible = visible[None, None]
    if segment_ids_BT is None:
        return visible
    same_segment = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return visible & same_segment


def sigmoid_attention_reference(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    bias: float,
    scale: float | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """`sigmoid(scale q k^T - slope |i - j| + bias) v`, with hidden pairs weighing exactly 0.

    Args as in `kernels.sigmoid_attention.sigmoid_attention`; returns (B, T, H, D).
    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", eq. 3.
    """
    queries, heads, width = q_BTHD.shape[1:]
    keys, key_heads = k_BSKD.shape[1:3]
    group = heads // key_heads
    k_BSHD = repeat(k_BSKD, "b s k d -> b s (k g) d", g=group)
    v_BSHD = repeat(v_BSKD, "b s k d -> b s (k g) d", g=group)
    scale = width**-0.5 if scale is None else scale
    scores_BHTS = einsum(q_BTHD, k_BSHD, "b t h d, b s h d -> b h t s") * scale + bias
    if alibi_slopes is not None:
        query_T1 = torch.arange(queries, device=q_BTHD.device)[:, None] + (keys - queries)
        distance_TS = (query_T1 - torch.arange(keys, device=q_BTHD.device)).abs()
        scores_BHTS = scores_BHTS - alibi_slopes.to(scores_BHTS.dtype)[:, None, None] * distance_TS
    visible = visible_pairs(queries, keys, causal=causal, segment_ids_BT=segment_ids, device=q_BTHD.device)
    weights_BHTS = scores_BHTS.masked_fill(~visible, float("-inf")).sigmoid()
    return einsum(weights_BHTS, v_BSHD, "b h t s, b s h d -> b t h d")
