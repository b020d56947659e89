"""Linear recurrences in plain torch, parallel over chunks of time.

Within a chunk the steps follow one another, all chunks at once; then the chunks' last states are passed on
from chunk to chunk. About 2 sqrt(T) vector operations in place of T. Shapes as in `reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.linear_recurrence.reference import compose, step


def chunked_linear_recurrence(
    a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """As `linear_recurrence_reference`, to rounding."""
    if reverse:
        return chunked_linear_recurrence(a.flip(1), b.flip(1), state).flip(1)
    block = a.dim() != b.dim()
    time = b.shape[1]
    length = max(1, math.isqrt(time))
    chunks = -(-time // length)
    a_chunks, b_chunks = _split(a, chunks, length), _split(b, chunks, length)
    y, products = torch.empty_like(b_chunks), torch.empty_like(a_chunks)
    y[:, :, 0], products[:, :, 0] = b_chunks[:, :, 0], a_chunks[:, :, 0]
    for i in range(1, length):
        y[:, :, i] = step(a_chunks[:, :, i], y[:, :, i - 1], b_chunks[:, :, i])
        products[:, :, i] = compose(a_chunks[:, :, i], products[:, :, i - 1], block=block)
    carry = torch.zeros_like(b[:, 0]) if state is None else state.to(b.dtype)
    for chunk in range(chunks):
        y[:, chunk] = step(products[:, chunk], carry[:, None], y[:, chunk])
        carry = y[:, chunk, -1]
    return y.flatten(1, 2)[:, :time]


def total_step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """All steps as one: the product (B, D) and the sum (B, D), or (B, 2, 2, D) and (B, 2, D), with which the last state
    is `product state + sum`. Steps are joined in pairs, then pairs of pairs."""
    block = a.dim() != b.dim()
    while b.shape[1] > 1:
        even = b.shape[1] // 2 * 2
        early, late = (slice(0, even, 2), slice(1, even, 2))
        b = torch.cat((step(a[:, late], b[:, early], b[:, late]), b[:, even:]), 1)
        a = torch.cat((compose(a[:, late], a[:, early], block=block), a[:, even:]), 1)
    return a[:, 0], b[:, 0]


def _split(x: Tensor, chunks: int, length: int) -> Tensor:
    """(B, T, ...) to (B, chunks, length, ...), zeros after the end."""
    missing = chunks * length - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return x.unflatten(1, (chunks, length))
