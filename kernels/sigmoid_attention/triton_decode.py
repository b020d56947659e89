# mypy: disallow-untyped-defs=False
"""A few queries against many keys (decoding over a cache): the keys are split over programs, the sums added.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sigmoid_attention.triton_math import interval, load_tile, weights


@triton.jit
def decode_kernel(
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
    chunk,
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
    PRECISION: tl.constexpr,
):
    """One chunk of keys for all queries of one key head's group; OUT is (splits, batch, queries, heads, width).

    The rows of the tile are queries by heads of the group, so that a key is loaded once for all of them.
    """
    split = tl.program_id(0)
    key_heads = heads // group
    key_head = tl.program_id(1) % key_heads
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    index = tl.arange(0, ROWS)
    known = index < queries * group
    row = index // group
    head = key_head * group + index % group
    low, high = interval(row, LOW, HIGH, batch, queries, keys, offset, left, right, LEFT, RIGHT, SEGMENTS)
    low = tl.maximum(low, split * chunk)
    high = tl.where(known, tl.minimum(high, split * chunk + chunk), 0)
    start = tl.min(tl.where(known & (low < high), low, keys), 0)
    end = tl.max(high, 0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + head, mask=known, other=0.0)[:, None]
    if HEAD_BIAS:
        bias = tl.load(BIAS + head, mask=known, other=0.0)[:, None]
    columns = tl.arange(0, WIDTH)
    inside = known[:, None] & (columns < width)[None, :]
    pointers = Q + batch * q_stride_b + (row * q_stride_t + head * q_stride_h)[:, None] + columns[None, :]
    q = tl.load(pointers, mask=inside, other=0.0)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for key in tl.range(start, end, KEYS):
        k = load_tile(
            K, batch, key, key_head, k_stride_b, k_stride_s, k_stride_h, keys, width, KEYS, WIDTH, BULK
        )
        v = load_tile(
            V, batch, key, key_head, v_stride_b, v_stride_s, v_stride_h, keys, width, KEYS, WIDTH, BULK
        )
        position = key + tl.arange(0, KEYS)
        products = tl.dot(q, k.T, input_precision=PRECISION)
        p = weights(
            products, (row + offset)[:, None], position[None, :], scale, bias, slope, ALIBI, POLYNOMIAL
        )
        seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
        acc = tl.dot(tl.where(seen, p, 0.0).to(v.dtype), v, acc, input_precision=PRECISION)
    place = (split * (tl.num_programs(1) // key_heads) + batch) * queries + row
    out = OUT + (place * heads + head)[:, None] * width + columns[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=inside)
