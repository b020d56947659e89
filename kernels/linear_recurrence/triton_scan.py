# mypy: disallow-untyped-defs=False
"""Scans of linear recurrences: a program has one row of the batch and C channels, and walks windows of W positions.

The exact state goes from window to window, so that any length takes one pass and no scratch memory. REVERSE:
from the end to the beginning. Everything is computed in fp32.

Shape suffixes: W positions of a window, C channels; tiles are (W, C).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose_diagonal(a1, b1, a2, b2):
    """y -> a2 (a1 y + b1) + b2, step 1 before step 2 in the direction of the scan."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def compose_block(a1, b1, c1, d1, u1, v1, a2, b2, c2, d2, u2, v2):
    """As `compose_diagonal`, for matrices [[a, b], [c, d]] and vectors (u, v)."""
    return (
        a2 * a1 + b2 * c1,
        a2 * b1 + b2 * d1,
        c2 * a1 + d2 * c1,
        c2 * b1 + d2 * d1,
        a2 * u1 + b2 * v1 + u2,
        c2 * u1 + d2 * v1 + v2,
    )


@triton.jit
def row_of(x, position, index):
    """Row `index` of a tile, (C,)."""
    return tl.sum(tl.where(position[:, None] == index, x, 0.0), 0)


@triton.jit
def diagonal_kernel(A, B, STATE, Y, T, D, W: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    row = tl.program_id(1)
    channel, position = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, W)
    inside = channel < D
    carry = tl.load(STATE + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    windows = tl.cdiv(T, W)
    entry = W - 1 if REVERSE else 0  # the row that the carry enters
    for window in range(windows):
        begin = (windows - 1 - window if REVERSE else window) * W
        valid = (begin + position < T)[:, None] & inside[None, :]
        at = (row.to(tl.int64) * T + begin) * D + position[:, None] * D + channel[None, :]
        # Positions past the end hand the carry on.
        a = tl.load(A + at, mask=valid, other=1.0).to(tl.float32)
        b = tl.load(B + at, mask=valid, other=0.0).to(tl.float32)
        b += tl.where(position[:, None] == entry, a * carry[None, :], 0.0)
        _, y = tl.associative_scan((a, b), 0, compose_diagonal, reverse=REVERSE)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=valid)
        carry = row_of(y, position, W - 1 - entry)


@triton.jit
def block_kernel(A, B, STATE, Y, T, D, W: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    row = tl.program_id(1)
    channel, position = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, W)
    inside = channel < D
    carry_u = tl.load(STATE + row * 2 * D + channel, mask=inside, other=0.0).to(tl.float32)
    carry_v = tl.load(STATE + (row * 2 + 1) * D + channel, mask=inside, other=0.0).to(tl.float32)
    windows = tl.cdiv(T, W)
    entry = W - 1 if REVERSE else 0
    for window in range(windows):
        begin = (windows - 1 - window if REVERSE else window) * W
        valid = (begin + position < T)[:, None] & inside[None, :]
        start = row.to(tl.int64) * T + begin
        matrix = A + start * 4 * D + position[:, None] * (4 * D) + channel[None, :]
        vector = start * 2 * D + position[:, None] * (2 * D) + channel[None, :]
        a = tl.load(matrix, mask=valid, other=1.0).to(tl.float32)
        b = tl.load(matrix + D, mask=valid, other=0.0).to(tl.float32)
        c = tl.load(matrix + 2 * D, mask=valid, other=0.0).to(tl.float32)
        d = tl.load(matrix + 3 * D, mask=valid, other=1.0).to(tl.float32)
        u = tl.load(B + vector, mask=valid, other=0.0).to(tl.float32)
        v = tl.load(B + vector + D, mask=valid, other=0.0).to(tl.float32)
        enters = position[:, None] == entry
        u += tl.where(enters, a * carry_u[None, :] + b * carry_v[None, :], 0.0)
        v += tl.where(enters, c * carry_u[None, :] + d * carry_v[None, :], 0.0)
        _, _, _, _, u, v = tl.associative_scan((a, b, c, d, u, v), 0, compose_block, reverse=REVERSE)
        tl.store(Y + vector, u.to(Y.dtype.element_ty), mask=valid)
        tl.store(Y + vector + D, v.to(Y.dtype.element_ty), mask=valid)
        carry_u = row_of(u, position, W - 1 - entry)
        carry_v = row_of(v, position, W - 1 - entry)
