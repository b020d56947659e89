"""Sigmoid attention by its definition: the plain form that every other form is compared with.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor

Window = int | tuple[int | None, int | None] | None


class Part(TypedDict, total=False):
    """Which part of a longer attention a call computes; see `sigmoid_attention`."""

    query_offset: int | None
    key_segment_ids: Tensor | None
    out_dtype: torch.dtype | None


def visible_pairs(
    queries: int,
    keys: int,
    *,
    offset: int,
    causal: bool,
    window: Window = None,
    segments: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which (query, key) pairs may meet, as bool (1 or B, 1, T, S).

    Query i stands at position i + offset among the keys. segments: ids (B, T) of queries and (B, S) of keys.
    """
    left, right = window if isinstance(window, tuple) else (window, window)
    position_T1 = torch.arange(queries, device=device)[:, None] + offset
    key_1S = torch.arange(keys, device=device)[None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible &= key_1S <= position_T1
    if left is not None:
        visible &= key_1S >= position_T1 - left
    if right is not None:
        visible &= key_1S <= position_T1 + right
    visible = visible[None, None]
    if segments is None:
        return visible
    return visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])


def sigmoid_attention_reference(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    bias: float | Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
    **part: Unpack[Part],
) -> Tensor:
    """`sigmoid(scale q k^T - slope |i - j| + bias) v`, with hidden pairs weighing exactly 0.

    Args as in `kernels.sigmoid_attention.sigmoid_attention`; returns (B, T, H, D).
    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", eq. 3.
    """
    queries, heads, width = q_BTHD.shape[1:]
    keys, key_heads = k_BSKD.shape[1:3]
    device = q_BTHD.device
    offset = part.get("query_offset")
    offset = keys - queries if offset is None else offset
    k_BSHD = k_BSKD.repeat_interleave(heads // key_heads, dim=2)
    v_BSHD = v_BSKD.repeat_interleave(heads // key_heads, dim=2)
    scale = width**-0.5 if scale is None else scale
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * scale
    scores_BHTS = scores_BHTS + (bias[:, None, None] if isinstance(bias, Tensor) else bias)
    if alibi_slopes is not None:
        distance_TS = (
            torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)
        )
        scores_BHTS = scores_BHTS - alibi_slopes.to(scores_BHTS.dtype)[:, None, None] * distance_TS.abs()
    segments = None
    if segment_ids is not None:
        key_ids = part.get("key_segment_ids")
        segments = (segment_ids, segment_ids if key_ids is None else key_ids)
    visible = visible_pairs(
        queries, keys, offset=offset, causal=causal, window=window, segments=segments, device=device
    )
    weights_BHTS = scores_BHTS.masked_fill(~visible, float("-inf")).sigmoid()
    out = torch.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHD)
    return out.to(part.get("out_dtype") or out.dtype)
