"""Launches the Triton kernels: makes their arguments from a problem, and their results from what they leave.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.sigmoid_attention.problem import Problem, segment_intervals
from kernels.sigmoid_attention.tiles import DECODE_ROWS, Kernel, Tile, decode_tile, padded, tile_for
from kernels.sigmoid_attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from kernels.sigmoid_attention.triton_decode import decode_kernel
from kernels.sigmoid_attention.triton_forward import forward_kernel
from kernels.sigmoid_attention.triton_math import LOG2E

DECODE_PROGRAMS = 528
"""Programs that a decode aims at: four on each of the 132 multiprocessors of an H100."""


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, out_dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Output (B, T, H, D). `tile`: instead of the table's."""
    if tile is None and problem.queries * problem.group <= DECODE_ROWS[-1]:
        return triton_decode(q, k, v, problem, out_dtype)
    tile = _tile("forward", problem, q.dtype) if tile is None else tile
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    blocks = triton.cdiv(problem.queries, tile.rows) * problem.heads * problem.batch
    operands, bulk = _operands([q], [k, v], tile.rows, tile.keys, tile)
    with torch.cuda.device_of(q):
        forward_kernel[(blocks,)](
            *operands,
            out,
            *_per_head(problem, q),
            *_key_intervals(problem, q),
            *_strides(q, k, v),
            *_score_constants(problem),
            *_sizes(problem),
            ROWS=tile.rows,
            KEYS=tile.keys,
            BULK=bulk,
            OWN_BULK=bulk and not tile.own_shared,
            **_constants(problem, tile),
        )
    return out


def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, out_dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Output (B, T, H, D) of few queries, with the keys split over programs and the partial sums added."""
    tile = _tile("decode", problem, q.dtype) if tile is None else tile
    tile = decode_tile(tile, problem.queries * problem.group)
    chunk, splits = split_keys(problem, tile)
    # One chunk writes the result itself; several write fp32 sums, added in a fixed order.
    dtype = out_dtype if splits == 1 else torch.float32
    out = torch.empty((splits, *q.shape), dtype=dtype, device=q.device)
    with torch.cuda.device_of(q):
        decode_kernel[(splits, problem.batch * problem.key_heads)](
            q,
            k,
            v,
            out,
            *_per_head(problem, q),
            *_key_intervals(problem, q),
            *_strides(q, k, v),
            *_score_constants(problem),
            *_sizes(problem),
            chunk,
            ROWS=tile.rows,
            KEYS=tile.keys,
            BULK=False,  # a descriptor for each new length of the cache would cost more than it saves
            **_constants(problem, tile),
        )
    return out[0] if splits == 1 else out.sum(0).to(out_dtype)


def split_keys(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Keys of a chunk (whole steps) and the number of chunks, so that the programs fill a GPU."""
    steps = triton.cdiv(problem.keys, tile.keys)
    wanted = triton.cdiv(DECODE_PROGRAMS, problem.batch * problem.key_heads)
    steps_per_chunk = triton.cdiv(steps, min(steps, wanted))
    return steps_per_chunk * tile.keys, triton.cdiv(steps, steps_per_chunk)


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, problem: Problem, needs: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, where `needs` (bias, slopes) says so, of the per-head tensors; else empty."""
    grad = grad.to(q.dtype)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq, dbias, dslopes = triton_query_gradient(grad, q, k, v, problem, needs)
    dk, dv = triton_key_gradient(grad, q, k, v, problem)
    return dq, dk, dv, dbias, dslopes


def triton_query_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    needs: Sequence[int] = (0, 0),
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D); dbias and dslopes (H,) in fp32 where needed, else empty."""
    tile = _tile("query gradient", problem, q.dtype) if tile is None else tile
    blocks = triton.cdiv(problem.queries, tile.rows)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shares = [
        q.new_empty((problem.batch, problem.heads, blocks if n else 0), dtype=torch.float32) for n in needs
    ]
    operands, bulk = _operands([q, grad], [k, v], tile.rows, tile.keys, tile)
    q_, grad_, k_, v_ = operands
    with torch.cuda.device_of(q):
        query_gradient_kernel[(blocks * problem.heads * problem.batch,)](
            q_,
            k_,
            v_,
            grad_,
            dq,
            *_per_head(problem, q),
            *shares,
            *_key_intervals(problem, q),
            *_strides(q, k, v, grad),
            problem.scale,
            *_score_constants(problem),
            *_sizes(problem),
            ROWS=tile.rows,
            KEYS=tile.keys,
            BULK=bulk,
            OWN_BULK=bulk and not tile.own_shared,
            BIAS_GRADIENT=bool(needs[0]),
            SLOPE_GRADIENT=bool(needs[1]),
            **_constants(problem, tile),
        )
    # The shares are added in a fixed order: the same gradient every time.
    dbias, dslopes = (x.sum((0, 2)) if n else q.new_empty(0) for x, n in zip(shares, needs, strict=True))
    return dq, dbias, dslopes


def triton_key_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, problem: Problem, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """dk and dv (B, S, K, D)."""
    tile = _tile("key gradient", problem, q.dtype) if tile is None else tile
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    blocks = triton.cdiv(problem.keys, tile.keys) * problem.key_heads * problem.batch
    operands, bulk = _operands([k, v], [q, grad], tile.keys, tile.rows, tile)
    k_, v_, q_, grad_ = operands
    parts = [(True, False), (False, True)] if tile.split else [(True, True)]
    with torch.cuda.device_of(q):
        for key_part, value_part in parts:
            key_gradient_kernel[(blocks,)](
                q_,
                k_,
                v_,
                grad_,
                dk,
                dv,
                *_per_head(problem, q),
                *_query_intervals(problem, q),
                *_strides(q, k, v, grad),
                problem.scale,
                *_score_constants(problem),
                *_sizes(problem),
                ROWS=tile.rows,
                KEYS=tile.keys,
                BULK=bulk,
                OWN_BULK=bulk and not tile.own_shared,
                KEY_PART=key_part,
                VALUE_PART=value_part,
                **_constants(problem, tile),
            )
    return dk, dv


def _tile(kernel: Kernel, problem: Problem, dtype: torch.dtype) -> Tile:
    limits = (problem.left, problem.right, problem.segments_BT, problem.slopes_H)
    edges = any(limit is not None for limit in limits)
    return tile_for(kernel, padded(problem.width), edges, dtype)


def _operands(
    own: list[Tensor], read: list[Tensor], own_rows: int, read_rows: int, tile: Tile
) -> tuple[list[Any], bool]:
    """What a program owns and what it reads, as tensor descriptors of so many rows if every tensor allows it.

    Else as tensors; so too what it owns in shared memory: the compiler leaves only a plain load there.
    """
    if not all(_bulk_copies(x) for x in (*own, *read)):
        return [*own, *read], False
    owned = own if tile.own_shared else [_descriptor(x, own_rows) for x in own]
    return [*owned, *(_descriptor(x, read_rows) for x in read)], True


def _bulk_copies(x: Tensor) -> bool:
    """Whether Hopper's bulk copies can read a tensor: 16-byte aligned, in start and in every stride."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    hopper = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return hopper and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, padded(x.shape[3])])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _score_constants(problem: Problem) -> tuple[float, float]:
    """Scale and bias of the negated scores in base 2."""
    return -LOG2E * problem.scale, -LOG2E * problem.bias


def _sizes(problem: Problem) -> tuple[int, ...]:
    left, right = problem.left or 0, problem.right or 0
    sizes = (problem.queries, problem.keys, problem.heads, problem.group, problem.width)
    return problem.offset, left, right, *sizes


def _per_head(problem: Problem, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Biases and slopes as the kernels take them; `unused` stands where there are none."""
    bias, slopes = problem.bias_H, problem.slopes_H
    return (
        unused if bias is None else bias.float().contiguous() * -LOG2E,
        unused if slopes is None else slopes.float().contiguous() * LOG2E,
    )


def _key_intervals(problem: Problem, unused: Tensor) -> tuple[Tensor, Tensor]:
    if problem.segments_BT is None or problem.key_segments_BS is None:
        return unused, unused
    return segment_intervals(problem.segments_BT, problem.key_segments_BS)


def _query_intervals(problem: Problem, unused: Tensor) -> tuple[Tensor, Tensor]:
    if problem.segments_BT is None or problem.key_segments_BS is None:
        return unused, unused
    return segment_intervals(problem.key_segments_BS, problem.segments_BT)


def _constants(problem: Problem, tile: Tile) -> dict[str, Any]:
    """What the kernels are compiled for, and how."""
    return {
        "WIDTH": padded(problem.width),
        "LEFT": problem.left is not None,
        "RIGHT": problem.right is not None,
        "SEGMENTS": problem.segments_BT is not None,
        "ALIBI": problem.slopes_H is not None,
        "HEAD_BIAS": problem.bias_H is not None,
        "POLYNOMIAL": tile.polynomial,
        "PRECISION": "tf32",  # of fp32 products; the op brings fp32 here only where that is allowed
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
