# mypy: disallow-untyped-defs=False
"""The backward pass in Triton: one kernel for dq (and the per-head gradients), one for dk and dv.

Each computes the weights again from q and k, so that every sum has one owner: no atomics, and the same result
every time. The price is two matrix products more than one fused kernel would need (seven instead of five).

    dV = P^T dO, dP = dO V^T, dS = P (1 - P) dP, dQ = scale dS K, dK = scale dS^T Q,
    dbias = sum dS, dslope = -sum |i - j| dS

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sigmoid_attention.triton_math import (
    block_edges,
    head_terms,
    load_tile,
    query_block,
    step_begin,
    store_tile,
    weights,
)


@triton.jit
def query_gradient_kernel(
    Q,
    K,
    V,
    GRAD,
    DQ,
    BIAS,
    SLOPES,
    DBIAS,
    DSLOPES,
    LOW,
    HIGH,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    scale,
    score_scale,
    bias,
    offset,
    left,
    right,
    queries,
    keys,
    heads,
    group,
    width,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr,
    HEAD_BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    SLOPE_GRADIENT: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    BULK: tl.constexpr,
    OWN_BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a block of query rows; DBIAS and DSLOPES (batch, heads, blocks) get this block's share."""
    block, blocks, head, batch = query_block(queries, heads, ROWS)
    row = block * ROWS
    rows, low, high, start, full_start, full_end, masked_steps = block_edges(
        row, LOW, HIGH, batch, queries, keys, offset, left, right, ROWS, KEYS, LEFT, RIGHT, SEGMENTS
    )
    bias, slope = head_terms(BIAS, SLOPES, bias, head, ALIBI, HEAD_BIAS)
    q = load_tile(
        Q, batch, row, head, q_stride_b, q_stride_t, q_stride_h, queries, width, ROWS, WIDTH, OWN_BULK
    )
    grad = load_tile(
        GRAD,
        batch,
        row,
        head,
        grad_stride_b,
        grad_stride_t,
        grad_stride_h,
        queries,
        width,
        ROWS,
        WIDTH,
        OWN_BULK,
    )
    key_head = head // group
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    bias_sum = tl.zeros([ROWS], tl.float32)
    slope_sum = tl.zeros([ROWS], tl.float32)
    for unmasked in tl.static_range(2):
        # The masked steps go first: their intervals need not be held through the others.
        steps = tl.cdiv(full_end - full_start, KEYS) if unmasked else masked_steps
        if unmasked or LEFT or RIGHT or SEGMENTS:
            for step in tl.range(0, steps):
                key = step_begin(step, start, full_start, full_end, KEYS, unmasked)
                k = load_tile(
                    K,
                    batch,
                    key,
                    key_head,
                    k_stride_b,
                    k_stride_s,
                    k_stride_h,
                    keys,
                    width,
                    KEYS,
                    WIDTH,
                    BULK,
                )
                v = load_tile(
                    V,
                    batch,
                    key,
                    key_head,
                    v_stride_b,
                    v_stride_s,
                    v_stride_h,
                    keys,
                    width,
                    KEYS,
                    WIDTH,
                    BULK,
                )
                columns = key + tl.arange(0, KEYS)
                positions = (rows + offset)[:, None]
                products = tl.dot(q, k.T, input_precision=PRECISION)
                p = weights(
                    products, positions, columns[None, :], score_scale, bias, slope, ALIBI, POLYNOMIAL
                )
                if not unmasked:
                    seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
                    p = tl.where(seen, p, 0.0)
                gradient = p * tl.dot(grad, v.T, input_precision=PRECISION)
                gradient -= p * gradient
                if BIAS_GRADIENT:
                    bias_sum += tl.sum(gradient, 1)
                if SLOPE_GRADIENT:
                    slope_sum -= tl.sum(gradient * tl.abs(positions - columns[None, :]).to(tl.float32), 1)
                acc = tl.dot(gradient.to(k.dtype), k, acc, input_precision=PRECISION)
    store_tile(DQ, acc * scale, batch, row, head, queries, heads, width, ROWS, WIDTH)
    share = (tl.cast(batch, tl.int64) * heads + head) * blocks + block
    if BIAS_GRADIENT:
        tl.store(DBIAS + share, tl.sum(bias_sum, 0))
    if SLOPE_GRADIENT:
        tl.store(DSLOPES + share, tl.sum(slope_sum, 0))


@triton.jit
def key_gradient_kernel(
    Q,
    K,
    V,
    GRAD,
    DK,
    DV,
    BIAS,
    SLOPES,
    LOW,
    HIGH,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    grad_stride_b,
    grad_stride_t,
    grad_stride_h,
    scale,
    score_scale,
    bias,
    offset,
    left,
    right,
    queries,
    keys,
    heads,
    group,
    width,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ALIBI: tl.constexpr,
    HEAD_BIAS: tl.constexpr,
    KEY_PART: tl.constexpr,
    VALUE_PART: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    BULK: tl.constexpr,
    OWN_BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a block of keys, summed over the query heads that read it.

    Tiles are transposed, keys by queries: P^T and dS^T are then operands as they stand in registers.
    LOW, HIGH: (batch, keys), the queries that share a key's segment.
    KEY_PART, VALUE_PART: which of the two is computed; wide heads leave registers for one alone.
    """
    blocks = tl.cdiv(keys, KEYS)
    key_heads = heads // group
    block = tl.program_id(0) % blocks  # the first keys are seen by most: they go first
    key_head = tl.program_id(0) // blocks % key_heads
    batch = tl.program_id(0) // blocks // key_heads
    key = block * KEYS
    rows, low, high, start, full_start, full_end, masked_steps = block_edges(
        key, LOW, HIGH, batch, keys, queries, -offset, right, left, KEYS, ROWS, RIGHT, LEFT, SEGMENTS
    )
    k = load_tile(
        K, batch, key, key_head, k_stride_b, k_stride_s, k_stride_h, keys, width, KEYS, WIDTH, OWN_BULK
    )
    v = load_tile(
        V, batch, key, key_head, v_stride_b, v_stride_s, v_stride_h, keys, width, KEYS, WIDTH, OWN_BULK
    )
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for head in range(key_head * group, key_head * group + group):
        bias, slope = head_terms(BIAS, SLOPES, bias, head, ALIBI, HEAD_BIAS)
        for unmasked in tl.static_range(2):
            steps = tl.cdiv(full_end - full_start, ROWS) if unmasked else masked_steps
            if unmasked or LEFT or RIGHT or SEGMENTS:
                for step in tl.range(0, steps):
                    row = step_begin(step, start, full_start, full_end, ROWS, unmasked)
                    q = load_tile(
                        Q,
                        batch,
                        row,
                        head,
                        q_stride_b,
                        q_stride_t,
                        q_stride_h,
                        queries,
                        width,
                        ROWS,
                        WIDTH,
                        BULK,
                    )
                    grad = load_tile(
                        GRAD,
                        batch,
                        row,
                        head,
                        grad_stride_b,
                        grad_stride_t,
                        grad_stride_h,
                        queries,
                        width,
                        ROWS,
                        WIDTH,
                        BULK,
                    )
                    columns = row + tl.arange(0, ROWS)
                    products = tl.dot(k, q.T, input_precision=PRECISION)
                    positions = (columns + offset)[None, :]
                    p = weights(
                        products, positions, rows[:, None], score_scale, bias, slope, ALIBI, POLYNOMIAL
                    )
                    if not unmasked:
                        seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
                        p = tl.where(seen, p, 0.0)
                    if VALUE_PART:
                        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
                    if KEY_PART:
                        gradient = p * tl.dot(v, grad.T, input_precision=PRECISION)
                        gradient -= p * gradient
                        dk = tl.dot(gradient.to(q.dtype), q, dk, input_precision=PRECISION)
    if KEY_PART:
        store_tile(DK, dk * scale, batch, key, key_head, keys, key_heads, width, KEYS, WIDTH)
    if VALUE_PART:
        store_tile(DV, dv, batch, key, key_head, keys, key_heads, width, KEYS, WIDTH)
