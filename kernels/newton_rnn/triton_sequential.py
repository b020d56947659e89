# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005 (tuples in a kernel are joined by +)
"""The recurrences in time order, forward and adjoint, each in one kernel: one lane per channel, time in a loop.

With many rows and channels this is near the memory's limit, and Newton's work is for nothing. What it waits for
is one step after the other, so the inputs of the next U steps are loaded while U steps are computed.

FLAG: the forward kernels do nothing where it is 0. They are launched behind Newton's method without asking the
host, and act only if its residual exceeded the limit.

Shape suffixes: U steps of a block, C channels; a vector is (C,).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.newton_rnn.triton_math import (
    gate_offsets,
    gru_gates,
    gru_jacobian,
    lstm_gates,
    lstm_jacobian,
    magnitude,
    row_sums,
)
from kernels.newton_rnn.triton_memory import (
    load_states,
    load_three,
    load_two,
    store_gates,
    store_six,
    store_states,
)


@triton.jit
def load_steps(POINTER, KEEP, start, begin, step, T, D, N, inside, U: tl.constexpr, SEGMENTS: tl.constexpr):
    """Three gates and whether the state is kept, for U positions from `begin` on, `step` (1 or -1) apart.

    POINTER: at the row's gates; KEEP: at row 0, and `start` the row's first position.
    Positions outside [0, T) load zeros and keep the state.
    """
    first, second, third, kept = (), (), (), ()
    for u in tl.static_range(U):
        t = begin + step * u
        there = (t >= 0) & (t < T)
        x = POINTER + t.to(tl.int64) * (3 * D)
        first = first + (tl.load(x, mask=inside & there, other=0.0),)
        second = second + (tl.load(x + N, mask=inside & there, other=0.0),)
        third = third + (tl.load(x + 2 * N, mask=inside & there, other=0.0),)
        if SEGMENTS:
            kept = kept + (tl.load(KEEP + start + t, mask=there, other=1) != 0,)
    return first, second, third, kept


@triton.jit
def load_rows(POINTER, begin, step, T, D, inside, U: tl.constexpr):
    """(C,) of a (T, D) tensor at U positions from `begin` on; zeros outside [0, T)."""
    rows = ()
    for u in tl.static_range(U):
        t = begin + step * u
        there = (t >= 0) & (t < T)
        rows = rows + (tl.load(POINTER + t.to(tl.int64) * D, mask=inside & there, other=0.0),)
    return rows


@triton.jit
def gru_sequential_kernel(
    GATES,
    RECURRENT,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    FINAL,
    NORMS,
    FLAG,
    T,
    D,
    N,
    C: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PREDICATED: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel = first + tl.arange(0, C)
    inside = channel < D
    steps = T
    if PREDICATED:
        inside = inside & (tl.load(FLAG) != 0)
        steps = T * tl.load(FLAG)
    a_z, a_r, a_s = load_three(RECURRENT, D, channel, inside)
    b_z, b_r, b_s = load_three(BIAS, D, channel, inside)
    h = tl.load(STATE + row * D + channel, mask=inside, other=0.0)
    start = row.to(tl.int64) * T
    gates = GATES + start * 3 * D + gate_offsets(first, C, N, ONE_HEAD)
    out = OUTPUT + start * D + channel
    norm = tl.zeros([C], tl.float32)
    zero = tl.full([], 0, tl.int32)  # makes tensors of positions, in the interpreter too
    next_z, next_r, next_s, next_kept = load_steps(gates, KEEP, start, zero, 1, T, D, N, inside, U, SEGMENTS)
    for begin in range(0, steps, U):
        x_z, x_r, x_s, kept = next_z, next_r, next_s, next_kept
        next_z, next_r, next_s, next_kept = load_steps(
            gates, KEEP, start, begin + U + zero, 1, T, D, N, inside, U, SEGMENTS
        )
        for u in tl.static_range(U):
            there = inside & (begin + u < T)
            if SEGMENTS:
                h = tl.where(kept[u], h, 0.0)
            z, r, s = gru_gates(
                h,
                x_z[u].to(tl.float32) + b_z,
                x_r[u].to(tl.float32) + b_r,
                x_s[u].to(tl.float32) + b_s,
                a_z,
                a_r,
                a_s,
                APPROXIMATE,
            )
            jacobian = magnitude(gru_jacobian(h, z, r, s, a_z, a_r, a_s))
            norm = tl.maximum(norm, tl.where(there, jacobian, 0.0))
            h = tl.where(there, h + z * (s - h), h)
            tl.store(out + (begin + u + zero).to(tl.int64) * D, h.to(OUTPUT.dtype.element_ty), mask=there)
    tl.store(FINAL + row * D + channel, h, mask=inside)
    tl.store(NORMS + row * D + channel, norm, mask=inside)


@triton.jit
def lstm_sequential_kernel(
    GATES,
    RECURRENT,
    PEEPHOLE,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    CELLS,
    FINAL,
    NORMS,
    FLAG,
    T,
    D,
    N,
    C: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PREDICATED: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel = first + tl.arange(0, C)
    inside = channel < D
    steps = T
    if PREDICATED:
        inside = inside & (tl.load(FLAG) != 0)
        steps = T * tl.load(FLAG)
    a_f, a_o, a_z = load_three(RECURRENT, D, channel, inside)
    p_f, p_o = load_two(PEEPHOLE, D, channel, inside)
    b_f, b_o, b_z = load_three(BIAS, D, channel, inside)
    c, h = load_states(STATE, row, D, channel, inside)
    start = row.to(tl.int64) * T
    gates = GATES + start * 3 * D + gate_offsets(first, C, N, ONE_HEAD)
    out = start * D + channel
    norm = tl.zeros([C], tl.float32)
    zero = tl.full([], 0, tl.int32)  # makes tensors of positions, in the interpreter too
    next_f, next_o, next_z, next_kept = load_steps(gates, KEEP, start, zero, 1, T, D, N, inside, U, SEGMENTS)
    for begin in range(0, steps, U):
        x_f, x_o, x_z, kept = next_f, next_o, next_z, next_kept
        next_f, next_o, next_z, next_kept = load_steps(
            gates, KEEP, start, begin + U + zero, 1, T, D, N, inside, U, SEGMENTS
        )
        for u in tl.static_range(U):
            there = inside & (begin + u < T)
            if SEGMENTS:
                c, h = tl.where(kept[u], c, 0.0), tl.where(kept[u], h, 0.0)
            f, o, z, value, tanh_c = lstm_gates(
                c,
                h,
                x_f[u].to(tl.float32) + b_f,
                x_o[u].to(tl.float32) + b_o,
                x_z[u].to(tl.float32) + b_z,
                a_f,
                a_o,
                a_z,
                p_f,
                p_o,
                APPROXIMATE,
            )
            cc, ch, hc, hh = lstm_jacobian(c, f, o, z, tanh_c, a_f, a_o, a_z, p_f, p_o)
            norm = tl.maximum(norm, tl.where(there, row_sums(cc, ch, hc, hh), 0.0))
            c, h = tl.where(there, value, c), tl.where(there, o * tanh_c, h)
            at = out + (begin + u + zero).to(tl.int64) * D
            tl.store(OUTPUT + at, h.to(OUTPUT.dtype.element_ty), mask=there)
            tl.store(CELLS + at, c.to(CELLS.dtype.element_ty), mask=there)
    store_states(FINAL, row, D, channel, c, h, inside)
    tl.store(NORMS + row * D + channel, norm, mask=inside)


@triton.jit
def gru_sequential_adjoint_kernel(
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
    C: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Walks backwards. The states are known: only the product with J_t waits for the step before."""
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel = first + tl.arange(0, C)
    inside = channel < D
    a_z, a_r, a_s = load_three(RECURRENT, D, channel, inside)
    b_z, b_r, b_s = load_three(BIAS, D, channel, inside)
    initial = tl.load(STATE + row * D + channel, mask=inside, other=0.0)
    back = tl.load(GRAD_FINAL + row * D + channel, mask=inside, other=0.0)
    start = row.to(tl.int64) * T
    gate = gate_offsets(first, C, N, ONE_HEAD)
    gates, d_gates = GATES + start * 3 * D + gate, D_GATES + start * 3 * D + gate
    states, grads = OUTPUT + start * D + channel, GRAD + start * D + channel
    zero = tl.zeros([C], tl.float32)
    d_az, d_ar, d_as, d_bz, d_br, d_bs = zero, zero, zero, zero, zero, zero
    last = T - 1 + tl.full([], 0, tl.int32)  # a tensor, in the interpreter too
    next_z, next_r, next_s, next_kept = load_steps(gates, KEEP, start, last, -1, T, D, N, inside, U, SEGMENTS)
    next_h = load_rows(states, last - 1, -1, T, D, inside, U)
    next_grad = load_rows(grads, last, -1, T, D, inside, U)
    for done in range(0, T, U):
        begin = last - done
        x_z, x_r, x_s, kept, states_before, grad = next_z, next_r, next_s, next_kept, next_h, next_grad
        next_z, next_r, next_s, next_kept = load_steps(
            gates, KEEP, start, begin - U, -1, T, D, N, inside, U, SEGMENTS
        )
        next_h = load_rows(states, begin - U - 1, -1, T, D, inside, U)
        next_grad = load_rows(grads, begin - U, -1, T, D, inside, U)
        for u in tl.static_range(U):
            t = begin - u
            there = inside & (t >= 0)
            h = tl.where(t == 0, initial, states_before[u].to(tl.float32))
            if SEGMENTS:
                h = tl.where(kept[u], h, 0.0)
            z, r, s = gru_gates(
                h,
                x_z[u].to(tl.float32) + b_z,
                x_r[u].to(tl.float32) + b_r,
                x_s[u].to(tl.float32) + b_s,
                a_z,
                a_r,
                a_s,
                APPROXIMATE,
            )
            factor = gru_jacobian(h, z, r, s, a_z, a_r, a_s)
            if SEGMENTS:
                factor = tl.where(kept[u], factor, 0.0)
            total = tl.where(there, grad[u].to(tl.float32) + back, 0.0)
            back = tl.where(there, factor * total, back)
            d_z = total * (s - h) * z * (1 - z)
            d_s = total * z * (1 - s * s)
            d_r = d_s * a_s * h * r * (1 - r)
            store_gates(d_gates + t.to(tl.int64) * (3 * D), N, d_z, d_r, d_s, there)
            d_az, d_ar, d_as = d_az + d_z * h, d_ar + d_r * h, d_as + d_s * (r * h)
            d_bz, d_br, d_bs = d_bz + d_z, d_br + d_r, d_bs + d_s
    tl.store(D_STATE + row * D + channel, back, mask=inside)
    sums = SUMS + row * 6 * D + channel
    store_six(sums, D, d_az, d_ar, d_as, d_bz, d_br, d_bs, inside)


@triton.jit
def lstm_sequential_adjoint_kernel(
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
    C: tl.constexpr,
    U: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel = first + tl.arange(0, C)
    inside = channel < D
    a_f, a_o, a_z = load_three(RECURRENT, D, channel, inside)
    p_f, p_o = load_two(PEEPHOLE, D, channel, inside)
    b_f, b_o, b_z = load_three(BIAS, D, channel, inside)
    initial_c, initial_h = load_states(STATE, row, D, channel, inside)
    back_c, back_h = load_states(GRAD_FINAL, row, D, channel, inside)
    start = row.to(tl.int64) * T
    gate = gate_offsets(first, C, N, ONE_HEAD)
    gates, d_gates = GATES + start * 3 * D + gate, D_GATES + start * 3 * D + gate
    states, cells = OUTPUT + start * D + channel, CELLS + start * D + channel
    grads = GRAD + start * D + channel
    zero = tl.zeros([C], tl.float32)
    d_af, d_ao, d_az, d_bf, d_bo, d_bz, d_pf, d_po = zero, zero, zero, zero, zero, zero, zero, zero
    last = T - 1 + tl.full([], 0, tl.int32)  # a tensor, in the interpreter too
    next_f, next_o, next_z, next_kept = load_steps(gates, KEEP, start, last, -1, T, D, N, inside, U, SEGMENTS)
    next_h = load_rows(states, last - 1, -1, T, D, inside, U)
    next_c = load_rows(cells, last - 1, -1, T, D, inside, U)
    next_grad = load_rows(grads, last, -1, T, D, inside, U)
    for done in range(0, T, U):
        begin = last - done
        x_f, x_o, x_z, kept = next_f, next_o, next_z, next_kept
        states_before, cells_before, grad = next_h, next_c, next_grad
        next_f, next_o, next_z, next_kept = load_steps(
            gates, KEEP, start, begin - U, -1, T, D, N, inside, U, SEGMENTS
        )
        next_h = load_rows(states, begin - U - 1, -1, T, D, inside, U)
        next_c = load_rows(cells, begin - U - 1, -1, T, D, inside, U)
        next_grad = load_rows(grads, begin - U, -1, T, D, inside, U)
        for u in tl.static_range(U):
            t = begin - u
            there = inside & (t >= 0)
            c = tl.where(t == 0, initial_c, cells_before[u].to(tl.float32))
            h = tl.where(t == 0, initial_h, states_before[u].to(tl.float32))
            if SEGMENTS:
                c, h = tl.where(kept[u], c, 0.0), tl.where(kept[u], h, 0.0)
            f, o, z, value, tanh_c = lstm_gates(
                c,
                h,
                x_f[u].to(tl.float32) + b_f,
                x_o[u].to(tl.float32) + b_o,
                x_z[u].to(tl.float32) + b_z,
                a_f,
                a_o,
                a_z,
                p_f,
                p_o,
                APPROXIMATE,
            )
            total_h = tl.where(there, grad[u].to(tl.float32) + back_h, 0.0)
            d_o = total_h * tanh_c * o * (1 - o)
            d_c = tl.where(there, back_c, 0.0) + total_h * o * (1 - tanh_c * tanh_c) + d_o * p_o
            d_f = d_c * (c - z) * f * (1 - f)
            d_z = d_c * (1 - f) * (1 - z * z)
            handed_c, handed_h = d_c * f + d_f * p_f, d_f * a_f + d_o * a_o + d_z * a_z
            if SEGMENTS:
                handed_c = tl.where(kept[u], handed_c, 0.0)
                handed_h = tl.where(kept[u], handed_h, 0.0)
            back_c, back_h = tl.where(there, handed_c, back_c), tl.where(there, handed_h, back_h)
            store_gates(d_gates + t.to(tl.int64) * (3 * D), N, d_f, d_o, d_z, there)
            d_af, d_ao, d_az = d_af + d_f * h, d_ao + d_o * h, d_az + d_z * h
            d_bf, d_bo, d_bz = d_bf + d_f, d_bo + d_o, d_bz + d_z
            d_pf, d_po = d_pf + d_f * c, d_po + d_o * value
    store_states(D_STATE, row, D, channel, back_c, back_h, inside)
    sums = SUMS + row * 8 * D + channel
    store_six(sums, D, d_af, d_ao, d_az, d_bf, d_bo, d_bz, inside)
    tl.store(sums + 6 * D, d_pf, mask=inside)
    tl.store(sums + 7 * D, d_po, mask=inside)
