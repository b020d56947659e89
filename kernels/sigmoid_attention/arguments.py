"""What `sigmoid_attention` accepts: each refusal names the argument and what it may be.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width, N documents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.sigmoid_attention.tiles import LARGEST_WIDTH

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, time, heads, head width), got shape {tuple(x.shape)}")
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"q must be one of {names}, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must share q's dtype and device ({q.dtype}, {q.device}), got {x.dtype}, {x.device}"
            )
    batch, _, heads, width = q.shape
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k must be ({batch}, keys, key heads, {width}), by q; got {tuple(k.shape)}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no size may be 0, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if heads % k.shape[2] != 0:
        raise ValueError(f"q's {heads} heads must be a multiple of k's heads, got {k.shape[2]}")
    if width > LARGEST_WIDTH:
        raise ValueError(f"q's head width may be 1 to {LARGEST_WIDTH}, got {width}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if width > 1 and x.stride(3) != 1:
            raise ValueError(
                f"{name}'s last dimension must be contiguous, got stride {x.stride(3)}: call .contiguous()"
            )


def check_constants(q: Tensor, bias: float | Tensor, scale: float, slopes: Tensor | None) -> None:
    if not abs(scale) < math.inf or not (isinstance(bias, Tensor) or abs(bias) < math.inf):
        raise ValueError(f"bias and scale must be finite, got {bias} and {scale}")
    for name, x in (("bias", bias), ("alibi_slopes", slopes)):
        if not isinstance(x, Tensor):
            continue
        if x.shape != (q.shape[2],) or x.device != q.device:
            raise ValueError(
                f"{name} must be ({q.shape[2]},), one per query head, on {q.device}; "
                f"got {tuple(x.shape)} on {x.device}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {x.dtype}")


def is_integer_or_none(x: object) -> bool:
    return x is None or isinstance(x, int | torch.SymInt)


def window_sides(
    window: int | tuple[int | None, int | None] | None, causal: bool
) -> tuple[int | None, int | None]:
    """How many keys a query sees to its left and to its right; None where there is no bound."""
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2 or not all(is_integer_or_none(x) and (x is None or x >= 0) for x in sides):
        raise ValueError(f"window must be a width >= 0, or (left, right) of such or None; got {window}")
    return sides[0], 0 if causal else sides[1]


def output_dtype(q: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    if wanted in (None, q.dtype):
        return q.dtype
    if wanted != torch.float32 or q.dtype == torch.float64:
        raise ValueError(f"out_dtype must be q's dtype ({q.dtype}) or float32 for partial sums, got {wanted}")
    return torch.float32


def segment_pair(
    q: Tensor, k: Tensor, segment_ids: Tensor | None, key_segment_ids: Tensor | None, offset: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Ids of queries and keys, checked for shape and dtype."""
    if segment_ids is None:
        if key_segment_ids is not None:
            raise ValueError("key_segment_ids need segment_ids, those of the queries")
        return None, None
    if key_segment_ids is None:
        if k.shape[1] != q.shape[1] or offset not in (None, 0):
            raise ValueError(
                f"segment_ids alone are for self attention, where k has q's {q.shape[1]} positions and "
                f"query_offset is 0; give key_segment_ids too (k has {k.shape[1]} positions)"
            )
        key_segment_ids = segment_ids
    named = (("segment_ids", segment_ids, q.shape[:2]), ("key_segment_ids", key_segment_ids, k.shape[:2]))
    for name, ids, shape in named:
        if ids.shape != shape or ids.device != q.device:
            raise ValueError(
                f"{name} must be {tuple(shape)} on {q.device}, got {tuple(ids.shape)} on {ids.device}"
            )
        if ids.dtype not in INTEGERS:
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if key_segment_ids.dtype != segment_ids.dtype:
        raise ValueError(f"key_segment_ids must have segment_ids' dtype, {segment_ids.dtype}")
    return segment_ids, key_segment_ids


def ids_of_documents(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Segment ids (1, T) of a row of documents that begin at cu_seqlens[:-1]; (N + 1,), from 0 to T."""
    if q.shape[0] != 1 or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"cu_seqlens are for self attention over one packed row, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be (documents + 1,) on {q.device}, "
            f"got {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"cu_seqlens must be integers (int64 or int32), got {cu_seqlens.dtype}")
    position_T = torch.arange(q.shape[1], device=q.device, dtype=cu_seqlens.dtype)
    # Bounds that decrease, or that do not span the row, give ids that decrease: the op refuses those.
    spans = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == q.shape[1]) & (cu_seqlens.diff() >= 0).all()
    ids_T = torch.searchsorted(cu_seqlens[1:].contiguous(), position_T, right=True)
    return torch.where(spans, ids_T, -position_T)[None]


def check_order(ids: Tensor | None, name: str) -> None:
    """Refuse ids that decrease along a row, which block skipping relies on.

    A ValueError, except on a GPU: to read the answer there the host would have to wait, so the device checks
    it by itself, and a violation shows as a failed assertion at the next synchronisation.
    """
    if ids is None or ids.shape[1] < 2:
        return
    ordered = (ids[:, 1:] >= ids[:, :-1]).all()
    message = (
        f"{name} must never decrease along a row (cu_seqlens must rise from 0 to the number of positions): "
        "number the documents of a row in the order they stand in"
    )
    if ids.device.type == "cuda":
        torch._assert_async(ordered, message)
    elif not bool(ordered):
        raise ValueError(message)
