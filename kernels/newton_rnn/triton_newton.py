# mypy: disallow-untyped-defs=False
"""Newton's method in one kernel: gates are read once, iterated in registers, and the states written once.

A program has one row of the batch and C channels; it walks the sequence in windows of W positions, each solved
to the end before the next begins from its exact last state. Per iteration: the step and its Jacobian at the
shifted states, the greatest residual, and a scan over the window. The decision to iterate again is the
program's own, window by window: no host is asked.

PARTIALS (programs, 5): greatest residual, sum of residuals, most iterations, greatest Jacobian norm, whether
the residual exceeded the limit after `iterations`.

Shape suffixes as in triton_math: tiles (W, C).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear_recurrence.triton_scan import compose_block, compose_diagonal, row_of
from kernels.newton_rnn.triton_math import (
    LSTM_BOUND,
    before,
    bounded,
    gate_offsets,
    gru_gates,
    gru_jacobian,
    lstm_gates,
    lstm_jacobian,
    magnitude,
    row_sums,
    summary,
)
from kernels.newton_rnn.triton_memory import (
    load_inputs,
    load_kept,
    load_states,
    load_three_rows,
    load_two_rows,
    store_partials,
    store_states,
)


@triton.jit
def go_on(worst, taken, iterations, max_iterations, tolerance, limit):
    """Whether to iterate once more, and whether the limit is exceeded after the regular iterations."""
    regular = taken < iterations
    exceeded = (taken >= iterations) & (worst > limit)
    return (regular & (worst > tolerance)) | (exceeded & (taken < max_iterations)), exceeded


@triton.jit
def gru_newton_kernel(
    GATES,
    RECURRENT,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    FINAL,
    PARTIALS,
    T,
    D,
    N,
    iterations,
    max_iterations,
    tolerance,
    limit,
    W: tl.constexpr,
    C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PROJECT: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    row, first = tl.program_id(1), tl.program_id(0) * C
    channel, position = first + tl.arange(0, C), tl.arange(0, W)
    inside = channel < D
    gate = gate_offsets(first, C, N, ONE_HEAD)
    a_z, a_r, a_s = load_three_rows(RECURRENT, D, channel, inside)
    b_z, b_r, b_s = load_three_rows(BIAS, D, channel, inside)
    state = tl.load(STATE + row * D + channel, mask=inside, other=0.0)
    start = row.to(tl.int64) * T
    worst_seen, total, norm = 0.0, 0.0, 0.0
    most, acted = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for begin in range(0, T, W):
        valid = (begin + position < T)[:, None] & inside[None, :]
        base = GATES + (start + begin) * 3 * D
        x = base + position[:, None] * (3 * D) + gate[None, :]
        x_z, x_r, x_s = load_inputs(x, N, valid, b_z, b_r, b_s)
        kept = load_kept(KEEP, start, begin, position, T, W, SEGMENTS)
        h = tl.where(kept & (position == 0)[:, None], state[None, :], 0.0)
        z, r, s = gru_gates(h, x_z, x_r, x_s, a_z, a_r, a_s, APPROXIMATE)
        states = h + z * (s - h)
        taken = tl.full([], 0, tl.int32)
        going = taken == 0
        worst, sum_here, norm_here = 0.0, 0.0, 0.0
        while going:
            h = tl.where(kept, before(states, state, position), 0.0)
            z, r, s = gru_gates(h, x_z, x_r, x_s, a_z, a_r, a_s, APPROXIMATE)
            jacobian = gru_jacobian(h, z, r, s, a_z, a_r, a_s)
            value = h + z * (s - h)
            residual = value - states
            size = magnitude(residual)
            worst, sum_here, norm_here = summary(size, size, magnitude(jacobian), valid)
            going, exceeded = go_on(worst, taken, iterations, max_iterations, tolerance, limit)
            acted = acted | exceeded.to(tl.int32)
            if going:
                _, change = tl.associative_scan(
                    (tl.where(kept, jacobian, 0.0), residual), 0, compose_diagonal
                )
                states += change
                if PROJECT:
                    states = bounded(states, value, 1.0)
                taken += 1
        worst_seen = tl.maximum(worst_seen, worst)
        total += sum_here
        norm = tl.maximum(norm, norm_here)
        most = tl.maximum(most, taken)
        out = OUTPUT + (start + begin) * D + position[:, None] * D + channel[None, :]
        tl.store(out, states.to(OUTPUT.dtype.element_ty), mask=valid)
        state = row_of(states, position, tl.minimum(W, T - begin) - 1)
    tl.store(FINAL + row * D + channel, state, mask=inside)
    store_partials(PARTIALS, row, worst_seen, total, most, norm, acted)


@triton.jit
def lstm_newton_kernel(
    GATES,
    RECURRENT,
    PEEPHOLE,
    BIAS,
    STATE,
    KEEP,
    OUTPUT,
    CELLS,
    FINAL,
    PARTIALS,
    T,
    D,
    N,
    iterations,
    max_iterations,
    tolerance,
    limit,
    W: tl.constexpr,
    C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PROJECT: tl.constexpr,
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
    state_c, state_h = load_states(STATE, row, D, channel, inside)
    start = row.to(tl.int64) * T
    worst_seen, total, norm = 0.0, 0.0, 0.0
    most, acted = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for begin in range(0, T, W):
        valid = (begin + position < T)[:, None] & inside[None, :]
        base = GATES + (start + begin) * 3 * D
        x = base + position[:, None] * (3 * D) + gate[None, :]
        x_f, x_o, x_z = load_inputs(x, N, valid, b_f, b_o, b_z)
        kept = load_kept(KEEP, start, begin, position, T, W, SEGMENTS)
        starts = kept & (position == 0)[:, None]
        c = tl.where(starts, state_c[None, :], 0.0)
        h = tl.where(starts, state_h[None, :], 0.0)
        f, o, z, cells, tanh_c = lstm_gates(c, h, x_f, x_o, x_z, a_f, a_o, a_z, p_f, p_o, APPROXIMATE)
        states = o * tanh_c
        taken = tl.full([], 0, tl.int32)
        going = taken == 0
        worst, sum_here, norm_here = 0.0, 0.0, 0.0
        while going:
            c = tl.where(kept, before(cells, state_c, position), 0.0)
            h = tl.where(kept, before(states, state_h, position), 0.0)
            f, o, z, value_c, tanh_c = lstm_gates(c, h, x_f, x_o, x_z, a_f, a_o, a_z, p_f, p_o, APPROXIMATE)
            cc, ch, hc, hh = lstm_jacobian(c, f, o, z, tanh_c, a_f, a_o, a_z, p_f, p_o)
            value_h = o * tanh_c
            residual_c, residual_h = value_c - cells, value_h - states
            size_c, size_h = magnitude(residual_c), magnitude(residual_h)
            worst, sum_here, norm_here = summary(
                tl.maximum(size_c, size_h), size_c + size_h, row_sums(cc, ch, hc, hh), valid
            )
            going, exceeded = go_on(worst, taken, iterations, max_iterations, tolerance, limit)
            acted = acted | exceeded.to(tl.int32)
            if going:
                _, _, _, _, change_c, change_h = tl.associative_scan(
                    (
                        tl.where(kept, cc, 0.0),
                        tl.where(kept, ch, 0.0),
                        tl.where(kept, hc, 0.0),
                        tl.where(kept, hh, 0.0),
                        residual_c,
                        residual_h,
                    ),
                    0,
                    compose_block,
                )
                cells += change_c
                states += change_h
                if PROJECT:
                    cells = bounded(cells, value_c, 1.0)
                    states = bounded(states, value_h, LSTM_BOUND)
                taken += 1
        worst_seen = tl.maximum(worst_seen, worst)
        total += sum_here
        norm = tl.maximum(norm, norm_here)
        most = tl.maximum(most, taken)
        out = (start + begin) * D + position[:, None] * D + channel[None, :]
        tl.store(OUTPUT + out, states.to(OUTPUT.dtype.element_ty), mask=valid)
        tl.store(CELLS + out, cells.to(CELLS.dtype.element_ty), mask=valid)
        last = tl.minimum(W, T - begin) - 1
        state_c, state_h = row_of(cells, position, last), row_of(states, position, last)
    store_states(FINAL, row, D, channel, state_c, state_h, inside)
    store_partials(PARTIALS, row, worst_seen, total, most, norm, acted)
