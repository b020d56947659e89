"""Attention over rows that ranks share.

Shape suffixes: P ranks that share a row, B rows, T all positions of a row, S = T / P positions of a rank, H query
heads, K key heads, D head width.

Bytes that a rank sends per layer, in keys' and values' own size N = B S K D elements each, forward and backward:

| | forward | backward | messages |
|---|---|---|---|
| ring: keys and values go around, then their gradients with them | 2 (P - 1) N | 4 (P - 1) N | 3 (P - 1) |
| gather: everybody gets all keys and values; gradients are summed where they belong | 2 (P - 1) N | 2 (P - 1) N | 2 |
| swap: positions for heads of q, k, v, and back for the output | (P - 1) / P (2 G + 2) N | the same | 4 |

with G = H / K query heads to a key head. A ring keeps no rank's keys but its own for the backward pass, and so it must
send them again. The gather keeps all of them, 2 P N elements per layer, unless the block is checkpointed; beside the
activations of a block (some 20 B S H D) that is little while P K is below 5 H. Sigmoid attention takes the gather:
two thirds of the bytes, one message where the ring waits for P - 1 in turn. The swap has the fewest bytes above
P = G + 1, but cuts heads, of which there may be too few; softmax attention, whose parts over ranges of keys are no
plain sum, takes it (Jacobs et al., "DeepSpeed Ulysses").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.stream.sequence_part import SequencePart
from kernels.sigmoid_attention import sigmoid_attention
from models.declared import Crossing
from models.sigmoid.mixer import SigmoidAttention
from pretrain.parallel.exchange import Exchange, gather, swap

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def gathered_attend(attention: SigmoidAttention, part: SequencePart, exchange: Exchange) -> Attend:
    """`SigmoidAttention.attend` for a rank that has a part of the positions: its queries, everybody's keys.

    A causal piece of queries is given the keys up to its end and no others, so that the balanced order gives all
    ranks the same work.
    """

    def attend(
        q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, ids_BT: Tensor | None, slopes_H: Tensor | None
    ) -> Tensor:
        k_BTKD, v_BTKD = in_order(gather(exchange, torch.stack((k_BSKD, v_BSKD))), part).unbind(0)
        time = k_BTKD.shape[1]
        ranges = part.ranges(time)
        pieces = q_BSHD.split([end - first for first, end in ranges], dim=1)
        outputs = []
        for queries, (first, end) in zip(pieces, ranges, strict=True):
            seen = end if attention.shape.causal else time
            outputs.append(
                sigmoid_attention(
                    queries,
                    k_BTKD[:, :seen],
                    v_BTKD[:, :seen],
                    bias=attention.bias,
                    causal=attention.shape.causal,
                    alibi_slopes=slopes_H,
                    segment_ids=None if ids_BT is None else ids_BT[:, first:end],
                    key_segment_ids=None if ids_BT is None else ids_BT[:, :seen],
                    query_offset=first,
                )
            )
        return torch.cat(outputs, dim=1)

    return attend


def in_order(x: Tensor, part: SequencePart) -> Tensor:
    """What all ranks hold, (P, X, B, S, ...) with any X, as whole rows (X, B, T, ...)."""
    if part.order == "contiguous":
        return x.movedim(0, 2).flatten(2, 3)
    halves = x.unflatten(3, (2, -1))  # of rank p the pieces p and 2 P - 1 - p
    rising, falling = halves[:, :, :, 0], halves[:, :, :, 1].flip(0)
    return torch.cat((rising, falling)).movedim(0, 2).flatten(2, 3)


def swapped(module: nn.Module, crossing: Crossing, exchange: Exchange) -> Callable[..., Any]:
    """A method of tensors by heads, for a rank that has a contiguous part of the positions: its part of the heads at
    all positions, as one process would compute them, and back.

    Arguments are as the crossing's `axes` say. Those of one dtype and one size beyond the heads travel together.
    """
    plain = getattr(module, crossing.method)

    def across(*inputs: Any) -> Any:
        assert len(inputs) == len(crossing.axes), (
            f"{type(module).__name__}.{crossing.method}: declared otherwise"
        )
        mine = list(inputs)
        travelling: dict[Any, list[int]] = {}
        for at, (x, axes) in enumerate(zip(inputs, crossing.axes, strict=True)):
            if x is not None and axes == "H":
                mine[at] = x.chunk(exchange.size)[exchange.rank]
            elif x is not None and axes == "BTH":
                travelling.setdefault((x.dtype, x.shape[3:]), []).append(at)
        for together in travelling.values():
            by_rank = [inputs[at].unflatten(2, (exchange.size, -1)) for at in together]
            arrived = positions_of_all(exchange, torch.cat(by_rank, dim=3).movedim(2, 0))
            # Kernels want whole heads next to each other; the split leaves gaps between positions.
            parts = arrived.split([x.shape[3] for x in by_rank], dim=2)
            for at, part in zip(together, parts, strict=True):
                mine[at] = part.contiguous()
        out = plain(*mine)
        first = out[0] if isinstance(out, tuple) else out
        back = positions_of_mine(exchange, first).movedim(0, 2).flatten(2, 3)
        return (back, *out[1:]) if isinstance(out, tuple) else back

    return across


def positions_of_all(exchange: Exchange, x: Tensor) -> Tensor:
    """Of x (P, B, S, ...), what each rank is to have of this rank's positions: this rank's of all, (B, T, ...)."""
    return swap(exchange, x).movedim(0, 1).flatten(1, 2)


def positions_of_mine(exchange: Exchange, x_BT: Tensor) -> Tensor:
    """The way back: of x (B, T, ...), this rank's of all positions, what all ranks have of its own: (P, B, S, ...)."""
    return swap(exchange, x_BT.unflatten(1, (exchange.size, -1)).movedim(1, 0))
