# mypy: disallow-untyped-defs=False
"""The adjoint in one kernel, parallel in time: gates, states and gradients are read once, gates' gradients written.

With J_t the Jacobian at the stored states, g_t the gradient of the output and k_t = 0 where a segment begins,
    u_t = k_t J_t^T (g_t + u_{t+1})          what position t hands back to t - 1, by one reverse scan,
    w_t = g_t + u_{t+1}                      the total gradient of the state after t,
and the gates' gradients are elementwise in w_t. A program walks windows backwards, carrying u. Gradients of the
parameters are summed over time in the program; SUMS (B, rows, D) is added up over B by the host, so that the
result does not depend on the order in which programs run.

Shape suffixes as in triton_math: tiles (W, C).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear_recurrence.triton_scan import compose_block, compose_diagonal, row_of
from kernels.newton_rnn.triton_math import (
    after,
    gate_offsets,
    gru_gates,
    gru_jacobian,
    lstm_gates,
    lstm_jacobian,
)
from kernels.newton_rnn.triton_memory import (
    load_inputs,
    load_kept,
    load_states,
    load_three_rows,
    load_two_rows,
    store_gates,
    store_six,
    store_states,
)


@triton.jit
def add_six(a1, b1, c1, d1, e1, f1, a2, b2, c2, d2, e2, f2):
    return a1 + a2, b1 + b2, c1 + c2, d1 + d2, e1 + e2, f1 + f2


@triton.jit
def load_before(STATES, initial, offsets, valid, position, begin, D):
    """The states before a window's positions; before position 0 `initial` (C,)."""
    has_before = valid & (begin + position > 0)[:, None]
    states = tl.load(STATES + offsets - D, mask=has_before, other=0.0).to(tl.float32)
    return tl.where((begin + position == 0)[:, None], initial[None, :], states)


@triton.jit
def gru_adjoint_kernel(
    GATES,
    RECURRENT,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    GRAD,
    GRAD_FINAL,
    D_GATES,
    D_STATE,
    SUMS,
    T,
    D,
    N,
    W: tl.constexpr,
    C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel, position = first + tl.arange(0, C), tl.arange(0, W)
    inside = channel < D
    gate = gate_offsets(first, C, N, ONE_HEAD)
    a_z, a_r, a_s = load_three_rows(RECURRENT, D, channel, inside)
    b_z, b_r, b_s = load_three_rows(BIAS, D, channel, inside)
    initial = tl.load(STATE + row * D + channel, mask=inside, other=0.0)
    carry = tl.load(GRAD_FINAL + row * D + channel, mask=inside, other=0.0)
    start = row.to(tl.int64) * T
    zero = tl.zeros([C], tl.float32)
    d_az, d_ar, d_as, d_bz, d_br, d_bs = zero, zero, zero, zero, zero, zero
    windows = tl.cdiv(T, W)
    for window in range(windows):
        begin = (windows - 1 - window) * W
        valid = (begin + position < T)[:, None] & inside[None, :]
        at = position[:, None] * (3 * D) + gate[None, :]
        x = GATES + (start + begin) * 3 * D + at
        offsets = (start + begin) * D + position[:, None] * D + channel[None, :]
        x_z, x_r, x_s = load_inputs(x, N, valid, b_z, b_r, b_s)
        h = load_before(OUTPUT, initial, offsets, valid, position, begin, D)
        grad = tl.load(GRAD + offsets, mask=valid, other=0.0).to(tl.float32)
        kept = load_kept(KEEP, start, begin, position, T, W, SEGMENTS)
        h = tl.where(kept, h, 0.0)
        z, r, s = gru_gates(h, x_z, x_r, x_s, a_z, a_r, a_s, APPROXIMATE)
        # After the end nothing changes what is handed back.
        factor = tl.where(valid, gru_jacobian(h, z, r, s, a_z, a_r, a_s), 1.0)
        factor = tl.where(kept, factor, 0.0)
        arriving = grad + tl.where(position[:, None] == W - 1, carry[None, :], 0.0)
        _, back = tl.associative_scan((factor, factor * arriving), 0, compose_diagonal, reverse=True)
        total = grad + after(back, carry, position, W)
        carry = row_of(back, position, 0)
        d_z = tl.where(valid, total * (s - h) * z * (1 - z), 0.0)
        d_s = tl.where(valid, total * z * (1 - s * s), 0.0)
        d_r = d_s * a_s * h * r * (1 - r)
        store_gates(D_GATES + (start + begin) * 3 * D + at, N, d_z, d_r, d_s, valid)
        p_az, p_ar, p_as, p_bz, p_br, p_bs = tl.reduce(
            (d_z * h, d_r * h, d_s * (r * h), d_z, d_r, d_s), 0, add_six
        )
        d_az, d_ar, d_as = d_az + p_az, d_ar + p_ar, d_as + p_as
        d_bz, d_br, d_bs = d_bz + p_bz, d_br + p_br, d_bs + p_bs
    tl.store(D_STATE + row * D + channel, carry, mask=inside)
    sums = SUMS + row * 6 * D + channel
    store_six(sums, D, d_az, d_ar, d_as, d_bz, d_br, d_bs, inside)


@triton.jit
def add_eight(a1, b1, c1, d1, e1, f1, g1, h1, a2, b2, c2, d2, e2, f2, g2, h2):
    return a1 + a2, b1 + b2, c1 + c2, d1 + d2, e1 + e2, f1 + f2, g1 + g2, h1 + h2


@triton.jit
def lstm_adjoint_kernel(
    GATES,
    RECURRENT,
    PEEPHOLE,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    CELLS,
    GRAD,
    GRAD_FINAL,
    D_GATES,
    D_STATE,
    SUMS,
    T,
    D,
    N,
    W: tl.constexpr,
    C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel, position = first + tl.arange(0, C), tl.arange(0, W)
    inside = channel < D
    gate = gate_offsets(first, C, N, ONE_HEAD)
    a_f, a_o, a_z = load_three_rows(RECURRENT, D, channel, inside)
    p_f, p_o = load_two_rows(PEEPHOLE, D, channel, inside)
    b_f, b_o, b_z = load_three_rows(BIAS, D, channel, inside)
    initial_c, initial_h = load_states(STATE, row, D, channel, inside)
    carry_c, carry_h = load_states(GRAD_FINAL, row, D, channel, inside)
    start = row.to(tl.int64) * T
    zero = tl.zeros([C], tl.float32)
    d_af, d_ao, d_az, d_bf, d_bo, d_bz, d_pf, d_po = zero, zero, zero, zero, zero, zero, zero, zero
    windows = tl.cdiv(T, W)
    for window in range(windows):
        begin = (windows - 1 - window) * W
        valid = (begin + position < T)[:, None] & inside[None, :]
        at = position[:, None] * (3 * D) + gate[None, :]
        x = GATES + (start + begin) * 3 * D + at
        offsets = (start + begin) * D + position[:, None] * D + channel[None, :]
        x_f, x_o, x_z = load_inputs(x, N, valid, b_f, b_o, b_z)
        c = load_before(CELLS, initial_c, offsets, valid, position, begin, D)
        h = load_before(OUTPUT, initial_h, offsets, valid, position, begin, D)
        grad = tl.load(GRAD + offsets, mask=valid, other=0.0).to(tl.float32)
        kept = load_kept(KEEP, start, begin, position, T, W, SEGMENTS)
        c, h = tl.where(kept, c, 0.0), tl.where(kept, h, 0.0)
        f, o, z, value, tanh_c = lstm_gates(c, h, x_f, x_o, x_z, a_f, a_o, a_z, p_f, p_o, APPROXIMATE)
        cc, ch, hc, hh = lstm_jacobian(c, f, o, z, tanh_c, a_f, a_o, a_z, p_f, p_o)
        # After the end nothing changes what is handed back: the identity.
        cc, hh = tl.where(valid, cc, 1.0), tl.where(valid, hh, 1.0)
        ch, hc = tl.where(valid, ch, 0.0), tl.where(valid, hc, 0.0)
        cc, ch = tl.where(kept, cc, 0.0), tl.where(kept, ch, 0.0)
        hc, hh = tl.where(kept, hc, 0.0), tl.where(kept, hh, 0.0)
        last = position[:, None] == W - 1
        arriving_c = tl.where(last, carry_c[None, :], 0.0)
        arriving_h = grad + tl.where(last, carry_h[None, :], 0.0)
        _, _, _, _, back_c, back_h = tl.associative_scan(
            (cc, hc, ch, hh, cc * arriving_c + hc * arriving_h, ch * arriving_c + hh * arriving_h),
            0,
            compose_block,
            reverse=True,
        )
        total_c = after(back_c, carry_c, position, W)
        total_h = grad + after(back_h, carry_h, position, W)
        carry_c, carry_h = row_of(back_c, position, 0), row_of(back_h, position, 0)
        d_o = tl.where(valid, total_h * tanh_c * o * (1 - o), 0.0)
        d_c = tl.where(valid, total_c + total_h * o * (1 - tanh_c * tanh_c), 0.0) + d_o * p_o
        d_f = d_c * (c - z) * f * (1 - f)
        d_z = d_c * (1 - f) * (1 - z * z)
        store_gates(D_GATES + (start + begin) * 3 * D + at, N, d_f, d_o, d_z, valid)
        s_af, s_ao, s_az, s_bf, s_bo, s_bz, s_pf, s_po = tl.reduce(
            (d_f * h, d_o * h, d_z * h, d_f, d_o, d_z, d_f * c, d_o * value), 0, add_eight
        )
        d_af, d_ao, d_az = d_af + s_af, d_ao + s_ao, d_az + s_az
        d_bf, d_bo, d_bz = d_bf + s_bf, d_bo + s_bo, d_bz + s_bz
        d_pf, d_po = d_pf + s_pf, d_po + s_po
    store_states(D_STATE, row, D, channel, carry_c, carry_h, inside)
    sums = SUMS + row * 8 * D + channel
    store_six(sums, D, d_af, d_ao, d_az, d_bf, d_bo, d_bz, inside)
    tl.store(sums + 6 * D, d_pf, mask=inside)
    tl.store(sums + 7 * D, d_po, mask=inside)
