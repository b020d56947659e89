# mypy: disallow-untyped-defs=False
"""What the recurrence kernels share: activations, cells, scan operators, shifts in time, addresses.

A tile is (W, C): W positions of one row of the batch, C channels. One row of it is (C,). The equations are those
of cells.py; `h` is the state before a position, `value` the state after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
LSTM_BOUND = tl.constexpr(0.7615941559557649)  # tanh 1


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """APPROXIMATE: one instruction, absolute error 5e-4 at most (an eighth of bfloat16's rounding near 1); for
    inputs of 16 bits. Else two special instructions, error 2e-7; also what the interpreter can run.
    """
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return 0.5 * tanh(0.5 * x, APPROXIMATE) + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def magnitude(x):
    """|x|, and infinity for what is not a number: a maximum would pass over it."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def bounded(x, value, BOUND: tl.constexpr):
    """An iterate brought back into [-BOUND, BOUND]; `value` where it overflowed or where that is not a number."""
    finite = (tl.abs(x) <= LARGEST) & (value == value)
    return tl.where(finite, tl.minimum(tl.maximum(x, -BOUND), BOUND), value)


@triton.jit
def combine_summaries(worst1, total1, norm1, worst2, total2, norm2):
    return tl.maximum(worst1, worst2), total1 + total2, tl.maximum(norm1, norm2)


@triton.jit
def summary(worst, total, norm, valid):
    """Over the valid positions of a tile: the greatest of `worst`, the sum of `total`, the greatest of `norm`."""
    parts = (tl.where(valid, worst, 0.0), tl.where(valid, total, 0.0), tl.where(valid, norm, 0.0))
    worst, total, norm = tl.reduce(parts, 0, combine_summaries)
    return tl.reduce((worst, total, norm), 0, combine_summaries)


@triton.jit
def before(x, first, position):
    """The tile one position later in time: row t holds x's row t - 1, and row 0 holds `first` (C,)."""
    source = tl.maximum(position - 1, 0)[:, None] + tl.zeros_like(x).to(tl.int32)
    return tl.where(position[:, None] == 0, first[None, :], tl.gather(x, source, 0))


@triton.jit
def after(x, last, position, W: tl.constexpr):
    """The tile one position earlier in time: row t holds x's row t + 1, and the last row holds `last` (C,)."""
    source = tl.minimum(position + 1, W - 1)[:, None] + tl.zeros_like(x).to(tl.int32)
    return tl.where(position[:, None] == W - 1, last[None, :], tl.gather(x, source, 0))


@triton.jit
def gate_offsets(first, C: tl.constexpr, N, ONE_HEAD: tl.constexpr):
    """Where C channels from `first` on lie in a position's (H, 3, N) gates; the next gate is N further.

    ONE_HEAD: a tile never crosses from one head into the next, so that its addresses are contiguous.
    """
    channel = first + tl.arange(0, C)
    if ONE_HEAD:
        return first + (first // N) * 2 * N + tl.arange(0, C)
    else:
        return channel + (channel // N) * 2 * N


@triton.jit
def gru_gates(h, x_z, x_r, x_s, a_z, a_r, a_s, APPROXIMATE: tl.constexpr):
    z = sigmoid(x_z + a_z * h, APPROXIMATE)
    r = sigmoid(x_r + a_r * h, APPROXIMATE)
    return z, r, tanh(x_s + a_s * (r * h), APPROXIMATE)


@triton.jit
def gru_jacobian(h, z, r, s, a_z, a_r, a_s):
    return (1 - z) + (s - h) * z * (1 - z) * a_z + z * (1 - s * s) * a_s * (r + h * r * (1 - r) * a_r)


@triton.jit
def lstm_gates(c, h, x_f, x_o, x_z, a_f, a_o, a_z, p_f, p_o, APPROXIMATE: tl.constexpr):
    """f, o, z, the new cell state and its tanh. p: the peephole weights."""
    f = sigmoid(x_f + a_f * h + p_f * c, APPROXIMATE)
    z = tanh(x_z + a_z * h, APPROXIMATE)
    value = z + f * (c - z)
    o = sigmoid(x_o + a_o * h + p_o * value, APPROXIMATE)
    return f, o, z, value, tanh(value, APPROXIMATE)


@triton.jit
def lstm_jacobian(c, f, o, z, tanh_c, a_f, a_o, a_z, p_f, p_o):
    """[[cc, ch], [hc, hh]]: rows of the new c and h, columns of the c and h before."""
    d_f = (c - z) * f * (1 - f)
    d_o = tanh_c * o * (1 - o)
    h_by_c = d_o * p_o + o * (1 - tanh_c * tanh_c)
    cc = f + d_f * p_f
    ch = d_f * a_f + (1 - f) * (1 - z * z) * a_z
    return cc, ch, h_by_c * cc, h_by_c * ch + d_o * a_o


@triton.jit
def row_sums(cc, ch, hc, hh):
    """The norm of a 2x2 Jacobian: the greater row sum of absolute values; infinity for what is not a number."""
    return tl.maximum(magnitude(tl.abs(cc) + tl.abs(ch)), magnitude(tl.abs(hc) + tl.abs(hh)))
