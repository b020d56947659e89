"""Recurrences and convolutions over rows that ranks share, each with a contiguous part of the positions.

Shape suffixes: P ranks that share a row, B rows, T all positions of a row, S = T / P positions of a rank, C channels,
H heads, G gates, N channels of a head, W taps; in a state space also P its head width, G its groups, N its state width.

Elements that a rank sends per layer, and in how many messages:

| | forward | messages | backward | messages |
|---|---|---|---|---|
| channels | (P - 1) / P B S (G + 1) C | 2 | the same | 2 |
| summaries, K iterations | B C (3 K (P - 1) + 1) | K + 2 | 2 (P - 1) B C | 1 |
| the same, two numbers of state | B C (8 K (P - 1) + 2) | K + 2 | 6 (P - 1) B C | 1 |
| the convolution's halo | B (W - 1) C | 1 | the same | 1 |

Channels are bit-exact and run the fused kernels. Summaries send less from about S = K P positions on, whatever the
length, but in more messages, and run in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.newton_rnn import Solution
from models.layers.conv import CausalConv
from models.mamba2.mixer import Mamba2Mixer
from models.mamba2.ssd import SSMInputs
from models.pararnn.cells import Cell, Weights
from pretrain.parallel.context_attention import positions_of_all, positions_of_mine
from pretrain.parallel.exchange import Exchange, from_left, gather

Solve = Callable[[Tensor, Weights, Tensor | None, Tensor | None], Solution]
Convolve = Callable[[Tensor, Tensor | None], Tensor]


def swapped_solve(cell: Cell, exchange: Exchange) -> Solve:
    """`Cell.solve` for a rank that has a part of the positions: its part of the channels at all positions, and back."""
    plain = cell.solve

    def solve(gates_BSHGN: Tensor, weights: Weights, state: Tensor | None, ids_BT: Tensor | None) -> Solution:
        by_rank = gates_BSHGN.transpose(2, 3).flatten(3).unflatten(3, (exchange.size, -1))
        gates_BTGN = positions_of_all(exchange, by_rank.movedim(3, 0))
        mine = tuple(weight.chunk(exchange.size, dim=-1)[exchange.rank] for weight in weights)
        solution = plain(gates_BTGN[:, :, None], mine, state, ids_BT)
        back = positions_of_mine(exchange, solution.output_BTD)
        return replace(solution, output_BTD=back.movedim(0, 2).flatten(2))

    return solve


def summarised_solve(cell: Cell, exchange: Exchange) -> Solve:
    """`Cell.solve` for a rank that has a part of the positions: all channels of its own positions."""
    plain = cell.solve

    def solve(gates_BSHGN: Tensor, weights: Weights, state: Tensor | None, ids_BT: Tensor | None) -> Solution:
        return plain(gates_BSHGN, weights, state, ids_BT, exchange=exchange)

    return solve


def haloed_convolution(conv: CausalConv, exchange: Exchange) -> Convolve:
    """`CausalConv.forward` for a rank that has a part of the positions: with the last inputs of the rank before."""
    plain = conv.forward

    def forward(x_BSC: Tensor, ids_BT: Tensor | None, before_BWC: Tensor | None = None) -> Tensor:
        assert before_BWC is None, "rows are shared in training, where nothing was read before"
        reach, time = conv.taps - 1, x_BSC.shape[1]
        before_BWC = from_left(exchange, x_BSC[:, time - reach :]) if reach else None
        if ids_BT is not None:
            # In front of a row stand zeros, of its first document.
            padded = torch.cat((ids_BT[:, :1].expand(-1, reach), ids_BT), dim=1)
            ids_BT = padded[:, exchange.rank * time : (exchange.rank + 1) * time + reach]
        return plain(x_BSC, ids_BT, before_BWC)

    return forward


def swapped_scan(mixer: Mamba2Mixer, exchange: Exchange) -> Callable[[SSMInputs], tuple[Tensor, Tensor]]:
    """`Mamba2Mixer.scan` for a rank that has a part of the positions: its part of the heads at all positions, and back.

    The maps, which heads share, are gathered; each rank reads the groups of its heads.
    """
    plain = mixer.scan

    def scan(inputs: SSMInputs) -> tuple[Tensor, Tensor]:
        size, rank = exchange.size, exchange.rank
        x_BSHP, dt_BSH = inputs.x_BTHP, inputs.dt_BTH
        heads, groups = x_BSHP.shape[2], inputs.in_BTGN.shape[2]
        x_BTHP = positions_of_all(exchange, x_BSHP.unflatten(2, (size, -1)).movedim(2, 0))
        dt_BTH = positions_of_all(exchange, dt_BSH.unflatten(2, (size, -1)).movedim(2, 0))
        maps = gather(exchange, torch.stack((inputs.in_BTGN, inputs.out_BTGN)))
        first, end = rank * groups // size, -(-(rank + 1) * groups // size)
        in_BTGN, out_BTGN = maps.movedim(0, 2).flatten(2, 3)[:, :, :, first:end].unbind(0)
        y_BTHP, state = plain(
            replace(
                inputs,
                x_BTHP=x_BTHP,
                dt_BTH=dt_BTH,
                rate_H=inputs.rate_H[rank * heads // size : (rank + 1) * heads // size],
                in_BTGN=in_BTGN,
                out_BTGN=out_BTGN,
            )
        )
        return positions_of_mine(exchange, y_BTHP).movedim(0, 2).flatten(2, 3), state

    return scan
