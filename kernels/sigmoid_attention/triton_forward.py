# mypy: disallow-untyped-defs=False
"""The forward pass in Triton: one program per block of query rows and head.

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
def forward_kernel(
    Q,
    K,
    V,
    OUT,
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
    scale,
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
    POLYNOMIAL: tl.constexpr,
    BULK: tl.constexpr,
    OWN_BULK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, _, head, batch = query_block(queries, heads, ROWS)
    row = block * ROWS
    rows, low, high, start, full_start, full_end, masked_steps = block_edges(
        row, LOW, HIGH, batch, queries, keys, offset, left, right, ROWS, KEYS, LEFT, RIGHT, SEGMENTS
    )
    bias, slope = head_terms(BIAS, SLOPES, bias, head, ALIBI, HEAD_BIAS)
    q = load_tile(
        Q, batch, row, head, q_stride_b, q_stride_t, q_stride_h, queries, width, ROWS, WIDTH, OWN_BULK
    )
    key_head = head // group
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
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
                products = tl.dot(q, k.T, input_precision=PRECISION)
                p = weights(
                    products,
                    (rows + offset)[:, None],
                    columns[None, :],
                    scale,
                    bias,
                    slope,
                    ALIBI,
                    POLYNOMIAL,
                )
                if not unmasked:
                    seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
                    p = tl.where(seen, p, 0.0)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    store_tile(OUT, acc, batch, row, head, queries, heads, width, ROWS, WIDTH)
