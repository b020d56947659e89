# mypy: disallow-untyped-defs=False
"""What the sigmoid attention kernels share: loading a tile, the range of keys a row sees, and the sigmoid.

Scores are in base 2 and negated throughout (y = -log2(e) times the score): a weight is 1 / (1 + 2^y), and the
change of sign and base costs nothing, for the host puts it into the scale and the bias.
Every mask is an interval: a query sees the keys [low, high), a key is seen by the queries [low, high). Both
ends never decrease from row to row, so the first and the last row of a block bound the whole block.

Shape suffixes: R rows of a tile, W its columns, D head width (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.devices import interpreting

INTERPRETED = tl.constexpr(interpreting())  # the interpreter knows no inline assembly
LOG2E = 1.4426950408889634

# 1 / (1 + z) on [0, 1] with a relative error of at most 5.1e-5, a 38th of bf16's rounding. Its residual
# 1 - (1 + z) r(z) is the Chebyshev polynomial T6(2 z - 1) over T6(-3), which no other quintic undercuts.
C0 = tl.constexpr(0.999948982194786)
C1 = tl.constexpr(-0.9962757002193766)
C2 = tl.constexpr(0.9534207438396001)
C3 = tl.constexpr(-0.7705729299525534)
C4 = tl.constexpr(0.4179378603132493)
C5 = tl.constexpr(-0.10448446507831233)


@triton.jit
def weight(y, POLYNOMIAL: tl.constexpr):
    """1 / (1 + 2^y) of a tile, right relatively however small it is; no tanh.approx, whose error is absolute.

    Exact form: two special-function instructions (exponential, reciprocal), relative error about 1e-6.
    Polynomial form: one (2^-|y|), then a quintic in it; relative error 5.1e-5.
    """
    if POLYNOMIAL:
        z = exp2(-tl.abs(y))
        r = ((((C5 * z + C4) * z + C3) * z + C2) * z + C1) * z + C0
        return r * tl.where(y <= 0.0, 1.0, z)
    else:
        return reciprocal(1.0 + exp2(y))


@triton.jit
def exp2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:  # tl.exp2 spends two more instructions on results below 2^-126
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    if INTERPRETED:
        return 1.0 / x
    else:  # a division costs half a dozen instructions more
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def weights(products, rows, columns, scale, bias, slope, ALIBI: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """Weights of a tile of products; `rows` and `columns` are positions, broadcast against each other.

    The bias rides in the multiply-add that scales the product: it costs no instruction.
    """
    if ALIBI:
        distance = tl.abs(rows - columns).to(tl.float32)
        return weight(products * scale + (bias + slope * distance), POLYNOMIAL)
    else:
        return weight(products * scale + bias, POLYNOMIAL)


@triton.jit
def load_tile(
    X,
    batch,
    row,
    head,
    stride_batch,
    stride_row,
    stride_head,
    length,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BULK: tl.constexpr,
):
    """Rows [row, row + ROWS) of one head as (R, D); what lies outside the tensor is 0.

    BULK: X is a tensor descriptor of block (1, ROWS, 1, WIDTH), else a pointer.
    """
    if BULK:
        return X.load([batch, row, head, 0]).reshape([ROWS, WIDTH])
    else:
        base = X + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head
        base += tl.cast(row, tl.int64) * stride_row
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, WIDTH)[None, :]
        inside = (rows < length - row) & (columns < width)
        return tl.load(base + rows * stride_row + columns, mask=inside, other=0.0)


@triton.jit
def store_tile(X, tile, batch, row, head, length, heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write (R, D) into a contiguous (batch, length, heads, width) tensor, where inside it."""
    start = (tl.cast(batch, tl.int64) * length + row) * heads + head
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    pointers = X + start * width + rows * (heads * width) + columns
    inside = (rows < length - row) & (columns < width)
    tl.store(pointers, tile.to(X.dtype.element_ty), mask=inside)


@triton.jit
def interval(
    index,
    LOW,
    HIGH,
    batch,
    length,
    other_length,
    first,
    below,
    above,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """[low, high) on the other side for each index: by the band around index + first, and by the segments.

    LOW, HIGH: (batch, length) int32, read under SEGMENTS. BELOW, ABOVE: whether the band ends at
    index + first - below, and at index + first + above.
    """
    low = index * 0
    high = index * 0 + other_length
    if BELOW:
        low = tl.maximum(low, index + (first - below))
    if ABOVE:
        high = tl.minimum(high, index + (first + above + 1))
    if SEGMENTS:
        known = index < length
        low = tl.maximum(low, tl.load(LOW + tl.cast(batch, tl.int64) * length + index, mask=known, other=0))
        high = tl.minimum(
            high, tl.load(HIGH + tl.cast(batch, tl.int64) * length + index, mask=known, other=0)
        )
    return low, high


@triton.jit
def bounds(first_low, first_high, last_low, last_high, STEP: tl.constexpr, RIGHT_EDGE: tl.constexpr):
    """Where a block's loop starts, where its unmasked steps start and end, and how many masked steps there are.

    Steps between `full_start` and `full_end` lie inside every row's interval; the masked ones are those before
    `full_start` and from `full_end` on. Without a right edge every interval ends where the tensor does, and
    what is loaded beyond it is 0: the last step needs no mask.
    """
    start = tl.maximum(first_low, 0)
    end = tl.maximum(last_high, start)
    full_start = start + tl.cdiv(tl.maximum(last_low - start, 0), STEP) * STEP
    full_start = tl.minimum(full_start, start + tl.cdiv(end - start, STEP) * STEP)
    if RIGHT_EDGE:
        full_end = full_start + tl.maximum(first_high - full_start, 0) // STEP * STEP
    else:
        full_end = tl.maximum(end, full_start)
    masked_steps = (full_start - start) // STEP + tl.cdiv(tl.maximum(end - full_end, 0), STEP)
    return start, full_start, full_end, masked_steps


@triton.jit
def block_edges(
    begin,
    LOW,
    HIGH,
    batch,
    length,
    other_length,
    first,
    below,
    above,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Of the block of ROWS indices from `begin` on: each one's interval (see `interval`), and the loop's `bounds`."""
    rows = begin + tl.arange(0, ROWS)
    last = tl.minimum(begin + ROWS, length) - 1
    low, high = interval(
        rows, LOW, HIGH, batch, length, other_length, first, below, above, BELOW, ABOVE, SEGMENTS
    )
    a, b = interval(
        begin, LOW, HIGH, batch, length, other_length, first, below, above, BELOW, ABOVE, SEGMENTS
    )
    c, d = interval(last, LOW, HIGH, batch, length, other_length, first, below, above, BELOW, ABOVE, SEGMENTS)
    start, full_start, full_end, masked_steps = bounds(a, b, c, d, STEP, ABOVE or SEGMENTS)
    return rows, low, high, start, full_start, full_end, masked_steps


@triton.jit
def query_block(queries, heads, ROWS: tl.constexpr):
    """Which block of query rows a program has, of how many, and its head and batch."""
    blocks = tl.cdiv(queries, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal rows that see most go first
    return block, blocks, tl.program_id(0) // blocks % heads, tl.program_id(0) // blocks // heads


@triton.jit
def step_begin(step, start, full_start, full_end, STEP: tl.constexpr, UNMASKED: tl.constexpr):
    """Where a step of the loop begins: the masked ones are those before the unmasked and those after."""
    if UNMASKED:
        return full_start + step * STEP
    else:
        begin = start + step * STEP
        return tl.where(begin < full_start, begin, begin + (full_end - full_start))


@triton.jit
def head_terms(BIAS, SLOPES, bias, head, ALIBI: tl.constexpr, HEAD_BIAS: tl.constexpr):
    """A head's bias, or the one of all heads, and its slope."""
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + head)
    if HEAD_BIAS:
        bias = tl.load(BIAS + head)
    return bias, slope
