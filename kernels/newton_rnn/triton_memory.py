# mypy: disallow-untyped-defs=False
"""How the recurrence kernels read and write: gates and weights come in threes, peepholes and LSTM states in twos.

The order in which an address is added up matters: another one cost a kernel 20 registers (`kernels/offline.py` counts).

Shape suffixes as in triton_math: tiles (W, C), vectors (C,).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_two(POINTER, stride, offset, inside):
    """Two vectors, `stride` elements apart, at an offset (C,); zeros outside."""
    return (
        tl.load(POINTER + offset, mask=inside, other=0.0),
        tl.load(POINTER + stride + offset, mask=inside, other=0.0),
    )


@triton.jit
def load_three(POINTER, stride, offset, inside):
    """Three vectors, `stride` elements apart, at an offset (C,); zeros outside."""
    return (
        tl.load(POINTER + offset, mask=inside, other=0.0),
        tl.load(POINTER + stride + offset, mask=inside, other=0.0),
        tl.load(POINTER + 2 * stride + offset, mask=inside, other=0.0),
    )


@triton.jit
def load_two_rows(POINTER, stride, offset, inside):
    """As `load_two`, each as a tile's row (1, C)."""
    first, second = load_two(POINTER, stride, offset, inside)
    return first[None, :], second[None, :]


@triton.jit
def load_three_rows(POINTER, stride, offset, inside):
    """As `load_three`, each as a tile's row (1, C)."""
    first, second, third = load_three(POINTER, stride, offset, inside)
    return first[None, :], second[None, :], third[None, :]


@triton.jit
def load_states(POINTER, row, D, channel, inside):
    """An LSTM's two states of a row, cell and output, from (B, 2, D)."""
    return (
        tl.load(POINTER + row * 2 * D + channel, mask=inside, other=0.0),
        tl.load(POINTER + (row * 2 + 1) * D + channel, mask=inside, other=0.0),
    )


@triton.jit
def store_states(POINTER, row, D, channel, cell, output, inside):
    """What `load_states` reads."""
    tl.store(POINTER + row * 2 * D + channel, cell, mask=inside)
    tl.store(POINTER + (row * 2 + 1) * D + channel, output, mask=inside)


@triton.jit
def load_inputs(POINTER, stride, valid, b_1, b_2, b_3):
    """The three gates of a window with their biases, in float32."""
    return (
        tl.load(POINTER, mask=valid, other=0.0).to(tl.float32) + b_1,
        tl.load(POINTER + stride, mask=valid, other=0.0).to(tl.float32) + b_2,
        tl.load(POINTER + 2 * stride, mask=valid, other=0.0).to(tl.float32) + b_3,
    )


@triton.jit
def load_kept(KEEP, start, begin, position, T, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """(W, 1): whether each position of a window keeps the state before it, which a segment's first does not."""
    kept = tl.full([W, 1], 1, tl.int1)
    if SEGMENTS:
        kept = tl.load(KEEP + start + begin + position, mask=begin + position < T, other=1)[:, None] != 0
    return kept


@triton.jit
def store_gates(POINTER, stride, first, second, third, inside):
    """Gradients of the three gates, in the type that is stored."""
    tl.store(POINTER, first.to(POINTER.dtype.element_ty), mask=inside)
    tl.store(POINTER + stride, second.to(POINTER.dtype.element_ty), mask=inside)
    tl.store(POINTER + 2 * stride, third.to(POINTER.dtype.element_ty), mask=inside)


@triton.jit
def store_six(POINTER, stride, first, second, third, fourth, fifth, sixth, inside):
    """Six vectors, `stride` elements apart."""
    tl.store(POINTER, first, mask=inside)
    tl.store(POINTER + stride, second, mask=inside)
    tl.store(POINTER + 2 * stride, third, mask=inside)
    tl.store(POINTER + 3 * stride, fourth, mask=inside)
    tl.store(POINTER + 4 * stride, fifth, mask=inside)
    tl.store(POINTER + 5 * stride, sixth, mask=inside)


@triton.jit
def store_partials(PARTIALS, row, worst, total, most, norm, acted):
    """What one program has seen, for the report: (programs, 5), as in triton_newton."""
    partial = PARTIALS + (row * tl.num_programs(0) + tl.program_id(0)) * 5
    tl.store(partial, worst)
    tl.store(partial + 1, total)
    tl.store(partial + 2, most.to(tl.float32))
    tl.store(partial + 3, norm)
    tl.store(partial + 4, acted.to(tl.float32))
