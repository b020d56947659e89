"""The public sigmoid attention: a torch custom op with its gradient, which picks the form by device.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.devices import interpreting, runs_triton
from kernels.ops import operator
from kernels.sigmoid_attention import arguments
from kernels.sigmoid_attention.blocked import blocked_backward, blocked_forward
from kernels.sigmoid_attention.problem import UNBOUNDED, problem_of
from kernels.sigmoid_attention.reference import Part, Window
from kernels.sigmoid_attention.tiles import SINGLE_WIDTHS

# On a CPU, computing the weights again costs a sixth of forward and backward together: they are kept while
# they are few, at most 64 MiB of fp32 per call.
KEPT_ELEMENTS = 2**24


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float | Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **part: Unpack[Part],
) -> Tensor:
    """`sigmoid(scale q k^T - slope |i - j| + bias) v`; a hidden pair weighs exactly 0.

    Args:
        q: (B, T, H, D), D up to 256. fp64, fp32, bf16 or fp16, on any device; the last dimension contiguous.
        k, v: (B, S, K, D) with H a multiple of K; query head h reads key head h // (H / K).
        bias: the logit bias, -ln(training length) in the published recipe; or (H,), which may be trained.
        scale: factor of q k^T; 1 / sqrt(D) if None.
        causal: a query sees no later key.
        window: how far a query sees: w keys to either side, or (left, right), inclusive; None is no bound.
        alibi_slopes: (H,) non-negative slopes of the true distance |i - j|; may be trained.
        segment_ids: (B, T) integers that never decrease along a row: positions with different ids do not see
            each other, and blocks without a common id are skipped. For T = S, unless key_segment_ids are given.
        cu_seqlens: instead of ids, for one packed row: (documents + 1,) starts of its documents, from 0 to T.
        part: query_offset, the position of the first query among the keys (S - T if None: the queries are the
            last T positions); key_segment_ids (B, S); out_dtype float32 for unrounded sums. There is no
            normaliser, so outputs over ranges of keys add up to the output over all of them: for keys
            [first, last) pass k[:, first:last], v[:, first:last], query_offset less first and out_dtype=float32.

    Returns (B, T, H, D) in q's dtype or out_dtype; a query without visible keys gives 0. Scores and sums are
    fp32 or wider; q, k and v alone are kept for the backward pass, whose gradient of the output is rounded to
    q's dtype. On a GPU, fp64 takes the blocked form (plain torch, which skips no block for segments there), and so
    does fp32 unless D <= 128 and TF32 is allowed (torch.backends.cuda.matmul.fp32_precision = "tf32"). Under autocast
    q, k and v are cast, as for torch's own attention.

    Raises ValueError naming the argument and what it may be; ids that decrease are found on a GPU by a device
    assertion instead, for the host does not wait there.
    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention".
    """
    q, k, v = _autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    offset = part.get("query_offset")
    _check_part(part)
    arguments.check_tensors(q, k, v)
    arguments.check_constants(q, bias, scale, alibi_slopes)
    left, right = arguments.window_sides(window, causal)
    out_dtype = arguments.output_dtype(q, part.get("out_dtype"))
    if cu_seqlens is not None:
        if segment_ids is not None:
            raise ValueError("cu_seqlens and segment_ids say the same: give one of them")
        segment_ids = arguments.ids_of_documents(q, k, cu_seqlens)
    segments = arguments.segment_pair(q, k, segment_ids, part.get("key_segment_ids"), offset)
    band = [UNBOUNDED if side is None else side for side in (left, right)]
    band.append(k.shape[1] - q.shape[1] if offset is None else offset)
    constants = [0.0 if isinstance(bias, Tensor) else float(bias), scale]
    per_head = (bias if isinstance(bias, Tensor) else None, alibi_slopes)
    attend = _Kept.apply if _worth_keeping(q, k, v, per_head) else _attend
    out: Tensor = attend(q, k, v, *per_head, *segments, constants, band, out_dtype)
    return out


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in autocast's dtype where that is on; fp64 stays, as in torch's own ops."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check_part(part: Part) -> None:
    unknown = set(part) - set(Part.__annotations__)
    if unknown:
        raise TypeError(f"sigmoid_attention takes no argument {', '.join(sorted(unknown))}")
    offset = part.get("query_offset")
    if not arguments.is_integer_or_none(offset):
        raise ValueError(f"query_offset must be an integer or None, got {offset}")


def _worth_keeping(q: Tensor, k: Tensor, v: Tensor, per_head: tuple[Tensor | None, Tensor | None]) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    few = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= KEPT_ELEMENTS
    trained = any(x is not None and x.requires_grad for x in (q, k, v, *per_head))
    return few and trained and not runs_triton(q)


class _Kept(torch.autograd.Function):
    """The blocked form with its weights kept: what runs on a CPU, eagerly, at small sizes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_H: Tensor | None,
        slopes_H: Tensor | None,
        segments: Tensor | None,
        key_segments: Tensor | None,
        constants: list[float],
        *rest: Any,
    ) -> Tensor:
        _check_segments(segments, key_segments)
        band, out_dtype = rest
        kept: list[Tensor] = []
        ctx.problem = problem_of(q, k, constants, band, (bias_H, slopes_H), (segments, key_segments))
        out = blocked_forward(q, k, v, ctx.problem, kept).to(out_dtype)
        ctx.dtypes = [None if x is None else x.dtype for x in (bias_H, slopes_H)]
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:5]
        dq, dk, dv, *sums = blocked_backward(grad, q, k, v, ctx.problem, needs=needs, kept=kept)
        per_head = [
            x.to(dtype) if needed else None for x, dtype, needed in zip(sums, ctx.dtypes, needs, strict=True)
        ]
        return dq, dk, dv, *per_head, None, None, None, None, None


@operator("triptych::sigmoid_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_H: Tensor | None,
    slopes_H: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    constants: Sequence[float],
    band: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    _check_segments(segments, key_segments)
    problem = problem_of(q, k, constants, band, (bias_H, slopes_H), (segments, key_segments))
    if takes_triton(q):
        from kernels.sigmoid_attention.triton_launch import triton_forward

        return triton_forward(q, k, v, problem, out_dtype)
    return blocked_forward(q, k, v, problem).to(out_dtype).contiguous()


@operator("triptych::sigmoid_attention_backward")
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_H: Tensor | None,
    slopes_H: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    constants: Sequence[float],
    band_and_needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """band_and_needs: the band, then whether the per-head bias and the slopes need gradients."""
    band, needs = band_and_needs[:3], band_and_needs[3:]
    problem = problem_of(q, k, constants, band, (bias_H, slopes_H), (segments, key_segments))
    if takes_triton(q):
        from kernels.sigmoid_attention.triton_launch import triton_backward

        dq, dk, dv, dbias, dslopes = triton_backward(grad, q, k, v, problem, needs)
    else:
        dq, dk, dv, dbias, dslopes = blocked_backward(grad, q, k, v, problem, needs=needs)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dbias.float(), dslopes.float()


def takes_triton(q: Tensor) -> bool:
    """Whether the kernels compute it: half precision, and fp32 up to a head width of 128 where torch's own switch
    allows TF32 products. Everything else, and every device without Triton, takes the blocked form."""
    if not runs_triton(q) or q.dtype == torch.float64:
        return False
    if q.dtype != torch.float32:
        return True
    return q.shape[3] <= SINGLE_WIDTHS[-1] and (_tf32_allowed() or interpreting())


def _tf32_allowed() -> bool:
    # Not allow_tf32: reading it raises once anyone has set the newer fp32_precision, which knows both.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _check_segments(segments: Tensor | None, key_segments: Tensor | None) -> None:
    arguments.check_order(segments, "segment_ids")
    if key_segments is not segments:
        arguments.check_order(key_segments, "key_segment_ids")


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_H: Tensor | None,
    slopes_H: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    constants: Sequence[float],
    band: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    return q.new_empty(q.shape, dtype=out_dtype)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_H: Tensor | None,
    slopes_H: Tensor | None,
    segments: Tensor | None,
    key_segments: Tensor | None,
    constants: Sequence[float],
    band_and_needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = [q.new_empty(q.shape[2] if needed else 0, dtype=torch.float32) for needed in band_and_needs[3:]]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sums[0], sums[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, constants, band, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.constants = constants
    ctx.band = band


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = [int(needed) for needed in ctx.needs_input_grad[3:5]]
    dq, dk, dv, *sums = _attend_backward(grad, *tensors, ctx.constants, [*ctx.band, *needs])
    per_head = [
        x.to(given.dtype) if needed else None
        for x, given, needed in zip(sums, tensors[3:5], needs, strict=True)
    ]
    return dq, dk, dv, *per_head, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_setup_context)
