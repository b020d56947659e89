"""Sigmoid attention in blocks of query rows, plain torch, with its gradient written by hand.

A row block meets only the keys its mask allows: what lies after its last row (causal), outside its window or
outside the segments it touches is never computed. The scores of one tile stay in cache; nothing of size T x S is kept,
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

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.sigmoid_attention.blocked_plan import Plan, Tile, plan_tiles
from kernels.sigmoid_attention.problem import Problem


def blocked_forward(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, problem: Problem, kept: list[Tensor] | None = None
) -> Tensor:
    """Output (B, T, H, D) in the inputs' dtype; the sum over keys is one matrix product per tile.

    `kept`: a list that receives the tiles' weights, in fp32 or wider, for the backward pass.
    """
    q_NRD, k_NSD, v_NSD = _group_rows(q_BTHD, problem), _heads_first(k_BSKD), _heads_first(v_BSKD)
    plan = plan_tiles(problem, q_BTHD.device)
    workspace = _Workspace(problem, plan, q_BTHD, buffers=1)
    out_NRD = torch.empty_like(q_NRD) if plan.complete else torch.zeros_like(q_NRD)
    for tile in plan.tiles:
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
    *,
    needs: Sequence[int] = (0, 0),
    kept: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (B, T, H, D) and of k, v (B, S, K, D), in the inputs' dtype, summed in fp32 or wider;
    then those of the per-head bias and slopes, (H,), where `needs` says so, else empty.

    `kept`: the weights that the forward pass left, or None to compute them again.
    """
    q_NRD, grad_NRD = _group_rows(q_BTHD, problem), _group_rows(grad_BTHD.to(q_BTHD.dtype), problem)
    k_NSD, v_NSD = _heads_first(k_BSKD), _heads_first(v_BSKD)
    plan = plan_tiles(problem, q_BTHD.device)
    workspace = _Workspace(problem, plan, q_BTHD, buffers=2)
    dq_NRD = torch.empty_like(q_NRD) if plan.complete else torch.zeros_like(q_NRD)
    # A last row block that meets every key goes first and writes what others add to.
    start = torch.empty_like if plan.last_meets_all else torch.zeros_like
    dk_NSD, dv_NSD = start(k_NSD, dtype=workspace.dtype), start(k_NSD, dtype=workspace.dtype)
    per_head = [dk_NSD.new_zeros(problem.heads if needed else 0) for needed in needs]
    for index, tile in reversed(list(enumerate(plan.tiles))):
        items, rows, keys = _slices(tile, problem)
        q_tile, k_tile, grad_tile = q_NRD[items, rows], k_NSD[items, keys], grad_NRD[items, rows]
        write = plan.last_meets_all and tile.row_end == problem.queries
        weights_NWR = workspace.weights(tile, q_tile, k_tile) if kept is None else kept[index]
        _accumulate(dv_NSD[items, keys], workspace.rounded(weights_NWR, 0), grad_tile, 1.0, write)
        dscores_NWR = workspace.score_gradient(weights_NWR, grad_tile, v_NSD[items, keys])
        workspace.add_per_head(tile, dscores_NWR, needs, per_head)
        dscores_NWR = workspace.rounded(dscores_NWR, 1)
        _accumulate(dq_NRD[items, rows], dscores_NWR.transpose(1, 2), k_tile, problem.scale, True)
        _accumulate(dk_NSD[items, keys], dscores_NWR, q_tile, problem.scale, write)
    dk_BSKD, dv_BSKD = (_heads_last(x, problem).to(k_BSKD.dtype) for x in (dk_NSD, dv_NSD))
    return _ungroup_rows(dq_NRD, problem), dk_BSKD, dv_BSKD, per_head[0], per_head[1]


class _Workspace:
    """The score buffers of one call, reused by every tile, and the constants that tiles share."""

    def __init__(self, problem: Problem, plan: Plan, like: Tensor, *, buffers: int) -> None:
        self.problem = problem
        self.low = like.dtype if like.dtype in (torch.bfloat16, torch.float16) else None
        self.dtype = torch.float32 if self.low else like.dtype
        size = max((tile.items * tile.rows * problem.group * tile.keys for tile in plan.tiles), default=0)
        self.buffers = [like.new_empty(size, dtype=self.dtype) for _ in range(buffers)]
        # Rounded copies of the weights and of the score gradient, the operands of low-precision products.
        self.low_buffers = [like.new_empty(size) for _ in range(buffers)] if self.low else []
        # Of one dimension: one without any would not make a sum with half-precision products fp32.
        self.bias = torch.full((1,), problem.bias, dtype=self.dtype, device=like.device)
        self.bias_KG = self._by_key_head(problem.bias_H)
        self.slopes_KG = self._by_key_head(problem.slopes_H)
        self.distance, self.origin = self._distances(plan, like.device)

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
        """dS = P (1 - P) dP, transposed (N, W, R), in fp32 or wider."""
        gradient_NWR = self._view(self.buffers[1], v_NWD, grad_NRD)
        if self.low is None:
            torch.bmm(v_NWD, grad_NRD.transpose(1, 2), out=gradient_NWR)
        else:
            products_NWR = self._view(self.low_buffers[1], v_NWD, grad_NRD)
            gradient_NWR.copy_(torch.bmm(v_NWD, grad_NRD.transpose(1, 2), out=products_NWR))
        torch.ops.aten.sigmoid_backward.grad_input(gradient_NWR, weights_NWR, grad_input=gradient_NWR)
        return gradient_NWR

    def add_per_head(
        self, tile: Tile, dscores_NWR: Tensor, needs: Sequence[int], sums: Sequence[Tensor]
    ) -> None:
        """Add the tile's part to the gradients of the biases, sum dS, and of the slopes, -sum |i - j| dS."""
        scores = self._by_time(tile, dscores_NWR)
        heads = slice(tile.head_start * self.problem.group, tile.head_end * self.problem.group)
        if needs[0]:
            sums[0][heads] += scores.sum((0, 2, 3)).flatten()
        if needs[1]:
            sums[1][heads] -= torch.einsum("bkwrg,wr->kg", scores, self._distance_of(tile)).flatten()

    def rounded(self, x_NWR: Tensor, buffer: int) -> Tensor:
        """The tile in the dtype of the products: itself, or a rounded copy."""
        if self.low is None:
            return x_NWR
        return self.low_buffers[buffer][: x_NWR.numel()].view(x_NWR.shape).copy_(x_NWR)

    def _view(self, buffer: Tensor, keys_NWD: Tensor, rows_NRD: Tensor) -> Tensor:
        shape = (keys_NWD.shape[0], keys_NWD.shape[1], rows_NRD.shape[1])
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def _distances(self, plan: Plan, device: torch.device) -> tuple[Tensor | None, int]:
        """A table with |origin + row - column|, of which each tile's distances are a window, and its origin."""
        if self.problem.slopes_H is None or not plan.tiles:
            return None, 0
        starts = [tile.row_start + self.problem.offset - tile.key_start for tile in plan.tiles]
        origin = max(starts)
        columns = max(origin - start + tile.keys for start, tile in zip(starts, plan.tiles, strict=True))
        row = torch.arange(max(tile.rows for tile in plan.tiles), dtype=self.dtype, device=device)
        column = torch.arange(columns, dtype=self.dtype, device=device)
        return (row[None, :] + origin - column[:, None]).abs_(), origin

    def _distance_of(self, tile: Tile) -> Tensor:
        """|i - j| of the tile's pairs, (W, rows)."""
        assert self.distance is not None
        first = self.origin - (tile.row_start + self.problem.offset - tile.key_start)
        return self.distance[first : first + tile.keys, : tile.rows]

    def _by_key_head(self, x_H: Tensor | None) -> Tensor | None:
        return None if x_H is None else x_H.to(self.dtype).view(self.problem.key_heads, self.problem.group)

    def _bias_of(self, tile: Tile, scores_NWR: Tensor) -> Tensor:
        """What the scores start from: the bias, and under ALiBi the bias minus slope times distance."""
        if self.slopes_KG is None and self.bias_KG is None:
            return self.bias
        scores = self._by_time(tile, scores_NWR)
        heads = slice(tile.head_start, tile.head_end)
        bias = self.bias if self.bias_KG is None else self.bias_KG[heads, None, None, :]
        if self.slopes_KG is None:
            scores.copy_(bias.expand(scores.shape))
        else:
            distance = self._distance_of(tile)[:, :, None].expand(scores.shape)
            torch.addcmul(bias, distance, self.slopes_KG[heads, None, None, :], value=-1, out=scores)
        return scores_NWR

    def _hide(self, tile: Tile, weights_NWR: Tensor) -> None:
        """Set the weights of hidden pairs to 0, in the part of the tile where there are any."""
        problem, weights = self.problem, self._by_time(tile, weights_NWR)
        first = tile.row_start + problem.offset - tile.key_start  # the first row's position in the tile
        if problem.right is not None and first + problem.right + 1 < tile.keys:
            # Row r sees columns up to r + first + right: only later ones than the first row's can be hidden.
            start = max(0, first + problem.right)
            self._plane(weights[:, :, start:]).triu_(start - first - problem.right)
        if problem.left is not None and first + tile.rows - 1 - problem.left > 0:
            # Row r sees columns from r + first - left: only earlier ones than the last row's can be hidden.
            stop = min(tile.keys, first + tile.rows - 1 - problem.left)
            self._plane(weights[:, :, :stop]).tril_(problem.left - first)
        if tile.mixed and problem.segments_BT is not None and problem.key_segments_BS is not None:
            batch = slice(tile.batch_start, tile.batch_end)
            row_ids = problem.segments_BT[batch, None, tile.row_start : tile.row_end]
            key_ids = problem.key_segments_BS[batch, tile.key_start : tile.key_end, None]
            same = (key_ids == row_ids)[:, None, :, :, None]
            weights *= same.to(weights.dtype)  # a product: masked_fill_ costs ten times as much on a CPU

    def _plane(self, weights: Tensor) -> Tensor:
        """Keys and time as the last two axes, which triu_ and tril_ want."""
        return weights.squeeze(4) if self.problem.group == 1 else weights.movedim(4, 2)

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
