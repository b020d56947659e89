"""The public sigmoid attention: a torch custom op with its gradient, which picks the form by device.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.sigmoid_attention.blocked import blocked_backward, blocked_forward, problem_of

# On a CPU, computing the weights again costs a sixth of forward and backward together: they are kept while
# they are few, at most 64 MiB of fp32 per call.
KEPT_ELEMENTS = 2**24
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float,
    scale: float | None = None,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """`sigmoid(scale q k^T - slope |i - j| + bias) v`; a hidden pair weighs exactly 0.

    Args:
        q: (B, T, H, D). fp64, fp32, bf16 or fp16, on any device.
        k, v: (B, S, K, D) with S >= T and H a multiple of K; query head h reads key head h // (H / K).
        bias: the logit bias, -ln(training length) in the published recipe. A constant, not trained.
        scale: factor of q k^T; 1 / sqrt(D) if None.
        causal: query i sees keys j <= i + S - T (the queries are the last T of S positions).
        alibi_slopes: (H,) non-negative slopes of the true distance |i + S - T - j|. Constants, not trained.
        segment_ids: (B, T) integers, for T = S: positions with different ids do not see each other.
            Ids that never decrease along a row (packed documents) let whole blocks be skipped on a CPU.

    Returns (B, T, H, D) in q's dtype. Scores and sums are fp32 or wider; q, k and v alone are kept for the
    backward pass. Raises ValueError naming the argument and what it may be.
    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention".
    """
    _check_tensors(q, k, v)
    _check_masks(q, k, alibi_slopes, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _worth_keeping(q, k, v):
        out: Tensor = _Kept.apply(q, k, v, float(bias), float(scale), causal, alibi_slopes, segment_ids)
        return out
    out = _attend(q, k, v, float(bias), float(scale), causal, alibi_slopes, segment_ids)
    return out


def _worth_keeping(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    few = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= KEPT_ELEMENTS
    return few and (q.requires_grad or k.requires_grad or v.requires_grad)


class _Kept(torch.autograd.Function):
    """The blocked form with its weights kept: what runs on a CPU, eagerly, at small sizes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: float,
        scale: float,
        causal: bool,
        alibi_slopes: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        kept: list[Tensor] = []
        ctx.problem = problem_of(
            q, k, bias=bias, scale=scale, causal=causal, alibi_slopes=alibi_slopes, segment_ids=segment_ids
        )
        out = blocked_forward(q, k, v, ctx.problem, kept)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = blocked_backward(grad, q, k, v, ctx.problem, kept)
        return dq, dk, dv, None, None, None, None, None


@torch.library.custom_op("triptych::sigmoid_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: float,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    problem = problem_of(
        q, k, bias=bias, scale=scale, causal=causal, alibi_slopes=alibi_slopes, segment_ids=segment_ids
    )
    return blocked_forward(q, k, v, problem)


@torch.library.custom_op("triptych::sigmoid_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: list[float],
    causal: bool,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    bias, scale = constants
    problem = problem_of(
        q, k, bias=bias, scale=scale, causal=causal, alibi_slopes=alibi_slopes, segment_ids=segment_ids
    )
    return blocked_backward(grad, q, k, v, problem)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: float,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: list[float],
    causal: bool,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, scale, causal, alibi_slopes, segment_ids = inputs
    ctx.save_for_backward(q, k, v, alibi_slopes, segment_ids)
    ctx.constants = [bias, scale]
    ctx.causal = causal


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, alibi_slopes, segment_ids = ctx.saved_tensors
    dq, dk, dv = _attend_backward(grad, q, k, v, ctx.constants, ctx.causal, alibi_slopes, segment_ids)
    return dq, dk, dv, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_setup_context)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
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
    batch, queries, heads, width = q.shape
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k must be ({batch}, keys, key heads, {width}), by q; got {tuple(k.shape)}")
    if k.shape[1] < queries:
        raise ValueError(f"k must have at least as many positions as q's {queries}, got {k.shape[1]}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no size may be 0, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if heads % k.shape[2] != 0:
        raise ValueError(f"q's {heads} heads must be a multiple of k's heads, got {k.shape[2]}")


def _check_masks(q: Tensor, k: Tensor, alibi_slopes: Tensor | None, segment_ids: Tensor | None) -> None:
    if alibi_slopes is not None:
        if alibi_slopes.shape != (q.shape[2],) or alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes must be ({q.shape[2]},), one per query head, on {q.device}; "
                f"got {tuple(alibi_slopes.shape)} on {alibi_slopes.device}"
            )
        if not alibi_slopes.is_floating_point() or alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes must be floating-point constants without a gradient")
    if segment_ids is None:
        return
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"segment_ids are for self attention, where k has q's {q.shape[1]} positions; got {k.shape[1]}"
        )
    if segment_ids.shape != q.shape[:2] or segment_ids.device != q.device:
        raise ValueError(
            f"segment_ids must be {tuple(q.shape[:2])} on {q.device}, "
            f"got {tuple(segment_ids.shape)} on {segment_ids.device}"
        )
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
