"""Sigmoid attention in blocks of query rows, plain torch, with its gradient written by hand.

A row block meets only the keys its mask allows: what lies after its last row (causal) or outside the
segments it touches is never computed. The scores of one tile stay in cache; nothing of size T x S is kept,
and the backward pass computes the weights again from q and k.

Per tile, with P the weights and c the scale (no row maximum, no row sum: sigmoid has no normaliser):
    P = sigmoid(c Q K^T - slope |i - j| + bias), O = P V
    dV = P^T dO, dP = dO V^T, dS = P (1 - P) dP, dQ = c dS K, dK = c dS^T Q

Tiles are kept transposed, keys by rows: on a CPU the products that read P and dS row by row (dV, dK) are then
up to 1.5 times faster, and the others hardly slower.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, G query heads per key head,
D head width, N = B K flattened, R rows of a tile (time x G), W keys of a tile.
The G query heads of one key head lie side by side as rows, so that a grouped tile is one matrix product and
the gradients of k and v add up over the group by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Measured (benchmarks/attention_cpu.py): two score buffers of this many fp32 elements stay in a 1 MiB L2.
CPU_TILE_ELEMENTS = 256 * 1024
CPU_ROWS = 128
# On a GPU a tile must be large enough to fill the device; 1 GiB of fp32 scores bounds the memory.
CUDA_TILE_ELEMENTS = 256 * 1024 * 1024
CUDA_ROWS = 512


@dataclass(frozen=True)
class Problem:
    """One call's sizes and constants. `segments` is (B, T) or None; `slopes` is (H,) or None."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    width: int
    bias: float
    scale: float
    causal: bool
    slopes: Tensor | None
    segments: Tensor | None

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return self.keys - self.queries


@dataclass(frozen=True)
class Tile:
    """Rows [row_start, row_end) against keys [key_start, key_end), for some batch elements and key heads.

    `diagonal`: the causal border runs through its last columns. `mixed`: more than one segment meets in it.
    """

    batch_start: int
    batch_end: int
    head_start: int
    head_end: int
    row_start: int
    row_end: int
    key_start: int
    key_end: int
    diagonal: bool
    mixed: bool

    @property
    def rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def keys(self) -> int:
        return self.key_end - self.key_start


def problem_of(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    *,
    bias: float,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    segment_ids: Tensor | None,
) -> Problem:
    batch, queries, heads, width = q_BTHD.shape
    keys, key_heads = k_BSKD.shape[1:3]
    return Problem(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        key_heads=key_heads,
        width=width,
        bias=bias,
        scale=scale,
        causal=causal,
        slopes=alibi_slopes,
        segments=segment_ids,
    )


def blocked_forward(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, problem: Problem, kept: list[Tensor] | None = None
) -> Tensor:
    """Output (B, T, H, D) in the inputs' dtype; the sum over keys is one matrix product per tile.

    `kept`: a list that receives the tiles' weights, in fp32 or wider, for the backward pass.
    """
    q_NRD, k_NSD, v_NSD = _group_rows(q_BTHD, problem), _heads_first(k_BSKD), _heads_first(v_BSKD)
    plan = plan_tiles(problem, q_BTHD.device)
    workspace = _Workspace(problem, plan, q_BTHD, buffers=1)
    out_NRD = torch.empty_like(q_NRD)
    for tile in plan:
        items, rows, keys = _slices(tile, problem)
        weights_NWR = workspace.weights(tile, q_NRD[items, rows], k_NSD[items, keys], fresh=kept is not None)
        if kept is not None:
            kept.append(weights_NWR)
        weights_NWR = workspace.rounded(weights_NWR, 0)
        torch.bmm(weights_NWR.transpose(1, 2), v_NSD[items, keys], out=out_NRD[items, rows])
    return _ungroup_rows(out_NRD, problem)


def blocked_backward(
    grad_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    problem: Problem,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B, T, H, D) and of k, v (B, S, K, D), in the inputs' dtype, summed in fp32 or wider.

    `kept`: the weights that the forward pass left, or None to compute them again.
    """
    q_NRD, grad_NRD = _group_rows(q_BTHD, problem), _group_rows(grad_BTHD, problem)
    k_NSD, v_NSD = _heads_first(k_BSKD), _heads_first(v_BSKD)
    plan = plan_tiles(problem, q_BTHD.device)
    workspace = _Workspace(problem, plan, q_BTHD, buffers=2)
    dq_NRD = torch.empty_like(q_NRD)
    # Without segments the last row block meets every key: it goes first and writes what others add to.
    start = torch.empty_like if problem.segments is None else torch.zeros_like
    dk_NSD, dv_NSD = start(k_NSD, dtype=workspace.dtype), start(k_NSD, dtype=workspace.dtype)
    for index, tile in reversed(list(enumerate(plan))):
        items, rows, keys = _slices(tile, problem)
        q_tile, k_tile, grad_tile = q_NRD[items, rows], k_NSD[items, keys], grad_NRD[items, rows]
        write = problem.segments is None and tile.row_end == problem.queries
        weights_NWR = workspace.weights(tile, q_tile, k_tile) if kept is None else kept[index]
        _accumulate(dv_NSD[items, keys], workspace.rounded(weights_NWR, 0), grad_tile, 1.0, write)
        dscores_NWR = workspace.score_gradient(weights_NWR, grad_tile, v_NSD[items, keys])
        _accumulate(dq_NRD[items, rows], dscores_NWR.transpose(1, 2), k_tile, problem.scale, True)
        _accumulate(dk_NSD[items, keys], dscores_NWR, q_tile, problem.scale, write)
    dk_BSKD, dv_BSKD = (_heads_last(x, problem).to(k_BSKD.dtype) for x in (dk_NSD, dv_NSD))
    return _ungroup_rows(dq_NRD, problem), dk_BSKD, dv_BSKD


def plan_tiles(problem: Problem, device: torch.device) -> list[Tile]:
    """The tiles of a call: row blocks, each cut into batch elements and heads that fit the cache."""
    on_cpu = device.type != "cuda"
    row_limit = max(1, (CPU_ROWS if on_cpu else CUDA_ROWS) // problem.group)
    # Each core works on its part of a tile, in a cache of its own.
    budget = CPU_TILE_ELEMENTS * torch.get_num_threads() if on_cpu else CUDA_TILE_ELEMENTS
    starts = list(range(0, problem.queries, row_limit))
    segments = _segment_bounds(problem, starts, row_limit)
    plan = []
    for block, row_start in enumerate(starts):
        row_end = min(row_start + row_limit, problem.queries)
        reach = row_end + problem.offset if problem.causal else problem.keys
        extent = reach
        if segments:
            extent = min(reach, max(last for _, last, _ in segments[block])) - min(segments[block])[0]
        items = max(1, budget // ((row_end - row_start) * problem.group * extent))
        batch_step = max(1, items // problem.key_heads)
        head_step = problem.key_heads if batch_step > 1 else min(items, problem.key_heads)
        for batch_start in range(0, problem.batch, batch_step):
            batch_end = min(batch_start + batch_step, problem.batch)
            bounds = segments[block][batch_start:batch_end] if segments else []
            key_start = min((first for first, _, _ in bounds), default=0)
            key_end = min(reach, max((last for _, last, _ in bounds), default=reach))
            for head_start in range(0, problem.key_heads, head_step):
                plan.append(
                    Tile(
                        batch_start=batch_start,
                        batch_end=batch_end,
                        head_start=head_start,
                        head_end=min(head_start + head_step, problem.key_heads),
                        row_start=row_start,
                        row_end=row_end,
                        key_start=key_start,
                        key_end=key_end,
                        diagonal=problem.causal,
                        mixed=_is_mixed(bounds, reach),
                    )
                )
    return plan


def _segment_bounds(problem: Problem, starts: list[int], row_limit: int) -> list[list[tuple[int, int, bool]]]:
    """Per row block and batch element: first key, end of keys, and whether its rows are of one segment.

    Empty without segments. Reading the ids would make the host wait for a GPU, and ids that decrease along
    a row may come back later: in both cases every key is kept and the mask alone decides.
    """
    ids_BT = problem.segments
    if ids_BT is None:
        return []
    whole = [[(0, problem.keys, False)] * problem.batch] * len(starts)
    if ids_BT.device.type != "cpu" or bool((ids_BT[:, 1:] < ids_BT[:, :-1]).any()):
        return whole
    ids_BT = ids_BT.contiguous()
    ends = [min(start + row_limit, problem.queries) - 1 for start in starts]
    first_ids_BN, last_ids_BN = ids_BT[:, starts].contiguous(), ids_BT[:, ends].contiguous()
    first_keys = torch.searchsorted(ids_BT, first_ids_BN).T.tolist()
    end_keys = torch.searchsorted(ids_BT, last_ids_BN, right=True).T.tolist()
    single = (first_ids_BN == last_ids_BN).T.tolist()
    return [
        list(zip(*per_block, strict=True)) for per_block in zip(first_keys, end_keys, single, strict=True)
    ]


def _is_mixed(bounds: list[tuple[int, int, bool]], reach: int) -> bool:
    if not bounds:
        return False
    same_start = len({first for first, _, _ in bounds}) == 1
    same_end = len({min(last, reach) for _, last, _ in bounds}) == 1
    return not (same_start and same_end and all(single for _, _, single in bounds))


class _Workspace:
    """The score buffers of one call, reused by every tile, and the constants that tiles share."""

    def __init__(self, problem: Problem, plan: list[Tile], like: Tensor, *, buffers: int) -> None:
        self.problem = problem
        self.low = like.dtype if like.dtype in (torch.bfloat16, torch.float16) else None
        self.dtype = torch.float32 if self.low else like.dtype
        size = max(
            (t.batch_end - t.batch_start) * (t.head_end - t.head_start) * t.rows * problem.group * t.keys
            for t in plan
        )
        self.buffers = [like.new_empty(size, dtype=self.dtype) for _ in range(buffers)]
        # Rounded copies of the weights and of the score gradient, the operands of low-precision products.
        self.low_buffers = [like.new_empty(size) for _ in range(buffers)] if self.low else []
        # Of one dimension: one without any would not make a sum with half-precision products fp32.
        self.bias = torch.full((1,), problem.bias, dtype=self.dtype, device=like.device)
        rows = max(tile.rows for tile in plan)
        self.distance = self._distances(rows, like.device) if problem.slopes is not None else None

    def weights(self, tile: Tile, q_NRD: Tensor, k_NWD: Tensor, *, fresh: bool = False) -> Tensor:
        """P transposed, (N, W, R), in fp32 or wider; hidden pairs are 0. `fresh`: in memory of its own."""
        buffer = self.buffers[0]
        if fresh:
            buffer = buffer.new_empty(k_NWD.shape[0] * k_NWD.shape[1] * q_NRD.shape[1])
        scores_NWR = self._view(buffer, k_NWD, q_NRD)
        start = self._bias_of(tile, scores_NWR)
        scale = self.problem.scale
        if self.low is None:
            torch.baddbmm(start, k_NWD, q_NRD.transpose(1, 2), alpha=scale, out=scores_NWR)
        else:
            # Near -ln n a half-precision score would be wrong by several percent of the weight:
            # the product is rounded before the bias joins it, and the sum is fp32.
            products_NWR = self._view(self.low_buffers[0], k_NWD, q_NRD)
            torch.bmm(k_NWD, q_NRD.transpose(1, 2), out=products_NWR)
            torch.add(start, products_NWR, alpha=scale, out=scores_NWR)
        scores_NWR.sigmoid_()
        self._hide(tile, scores_NWR)
        return scores_NWR

    def score_gradient(self, weights_NWR: Tensor, grad_NRD: Tensor, v_NWD: Tensor) -> Tensor:
        """dS = P (1 - P) dP, transposed (N, W, R), in the dtype of the products."""
        gradient_NWR = self._view(self.buffers[1], v_NWD, grad_NRD)
        if self.low is None:
            torch.bmm(v_NWD, grad_NRD.transpose(1, 2), out=gradient_NWR)
        else:
            products_NWR = self._view(self.low_buffers[1], v_NWD, grad_NRD)
            gradient_NWR.copy_(torch.bmm(v_NWD, grad_NRD.transpose(1, 2), out=products_NWR))
        torch.ops.aten.sigmoid_backward.grad_input(gradient_NWR, weights_NWR, grad_input=gradient_NWR)
        return self.rounded(gradient_NWR, 1)

    def rounded(self, x_NWR: Tensor, buffer: int) -> Tensor:
        """The tile in the dtype of the products: itself, or a rounded copy."""
        if self.low is None:
            return x_NWR
        return self.low_buffers[buffer][: x_NWR.numel()].view(x_NWR.shape).copy_(x_NWR)

    def _view(self, buffer: Tensor, keys_NWD: Tensor, rows_NRD: Tensor) -> Tensor:
        shape = (keys_NWD.shape[0], keys_NWD.shape[1], rows_NRD.shape[1])
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def _distances(self, rows: int, device: torch.device) -> Tensor:
        """(S + S or S + R, R) with |S + r - c|: a tile's distances are a window of it."""
        problem = self.problem
        columns = problem.keys + (rows if problem.causal else problem.keys)
        row = torch.arange(rows, dtype=self.dtype, device=device)[None, :]
        column = torch.arange(columns, dtype=self.dtype, device=device)[:, None]
        return (row + problem.keys - column).abs_()

    def _bias_of(self, tile: Tile, scores_NWR: Tensor) -> Tensor:
        """What the scores start from: the bias, and under ALiBi the bias minus slope times distance."""
        if self.distance is None or self.problem.slopes is None:
            return self.bias
        first = self.problem.keys - (tile.row_start + self.problem.offset - tile.key_start)
        scores = self._by_time(tile, scores_NWR)
        distance = self.distance[first : first + tile.keys, : tile.rows, None].expand(scores.shape)
        slopes_KG = self.problem.slopes.to(self.dtype).view(self.problem.key_heads, self.problem.group)
        slopes = slopes_KG[tile.head_start : tile.head_end, None, None, :]
        torch.addcmul(self.bias, distance, slopes, value=-1, out=scores)
        return scores_NWR

    def _hide(self, tile: Tile, weights_NWR: Tensor) -> None:
        """Set the weights of hidden pairs to 0, in the part of the tile where there are any."""
        weights = self._by_time(tile, weights_NWR)
        if tile.diagonal:
            # The causal border lies in the last `rows` keys; triu_ wants keys and time in the last two axes.
            border = weights[:, :, -tile.rows :]
            border = border.squeeze(4) if self.problem.group == 1 else border.movedim(4, 2)
            border.triu_()
        if tile.mixed and self.problem.segments is not None:
            ids_BT = self.problem.segments[tile.batch_start : tile.batch_end]
            row_ids = ids_BT[:, None, tile.row_start : tile.row_end]
            key_ids = ids_BT[:, tile.key_start : tile.key_end, None]
            same = (key_ids == row_ids)[:, None, :, :, None]
            weights *= same.to(weights.dtype)  # a product: masked_fill_ costs ten times as much on a CPU

    def _by_time(self, tile: Tile, x_NWR: Tensor) -> Tensor:
        """View (N, W, R) as (batch, key heads, keys, time, group)."""
        batch, heads = tile.batch_end - tile.batch_start, tile.head_end - tile.head_start
        return x_NWR.view(batch, heads, tile.keys, tile.rows, self.problem.group)


def _slices(tile: Tile, problem: Problem) -> tuple[slice, slice, slice]:
    """The tile's items (of N), rows (of T G) and keys (of S)."""
    first = tile.batch_start * problem.key_heads + tile.head_start
    last = (tile.batch_end - 1) * problem.key_heads + tile.head_end
    rows = slice(tile.row_start * problem.group, tile.row_end * problem.group)
    return slice(first, last), rows, slice(tile.key_start, tile.key_end)


def _accumulate(total_NWD: Tensor, left_NWR: Tensor, right_NRD: Tensor, scale: float, write: bool) -> None:
    """Add scale times the product to the total, or write it there."""
    if total_NWD.dtype == left_NWR.dtype:
        total_NWD.baddbmm_(left_NWR, right_NRD, beta=0 if write else 1, alpha=scale)
    elif write:
        total_NWD.copy_(torch.bmm(left_NWR, right_NRD)).mul_(scale)
    else:  # many rounded sums would drift: the total is fp32
        total_NWD.add_(torch.bmm(left_NWR, right_NRD), alpha=scale)


def _group_rows(x_BTHD: Tensor, problem: Problem) -> Tensor:
    """(B, T, H, D) to (B K, T G, D)."""
    x = x_BTHD.unflatten(2, (problem.key_heads, problem.group)).transpose(1, 2)
    return x.reshape(problem.batch * problem.key_heads, problem.queries * problem.group, problem.width)


def _ungroup_rows(x_NRD: Tensor, problem: Problem) -> Tensor:
    """(B K, T G, D) to (B, T, H, D), a view where heads are not grouped."""
    shape = (problem.batch, problem.key_heads, problem.queries, problem.group, problem.width)
    return x_NRD.view(shape).transpose(1, 2).flatten(2, 3)


def _heads_first(x_BSKD: Tensor) -> Tensor:
    """(B, S, K, D) to (B K, S, D)."""
    return x_BSKD.transpose(1, 2).reshape(-1, x_BSKD.shape[1], x_BSKD.shape[3])


def _heads_last(x_NSD: Tensor, problem: Problem) -> Tensor:
    """(B K, S, D) to (B, S, K, D)."""
    return x_NSD.view(problem.batch, problem.key_heads, problem.keys, problem.width).transpose(1, 2)
