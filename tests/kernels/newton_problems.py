"""Random calls of the recurrence ops, and their results with every gradient.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.newton_rnn import Solution, Solver, gru, lstm
from kernels.newton_rnn.cells import LSTM_OUTPUT_BOUND


@dataclass(frozen=True)
class Shape:
    cell: str = "gru"
    batch: int = 2
    time: int = 37
    heads: int = 2
    channels: int = 3
    scale: float = 0.3  # standard deviation of the recurrent weights
    clip: float = 0.5
    segments: bool = False
    state: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def width(self) -> int:
        return self.heads * self.channels


@dataclass
class Arguments:
    """Positional tensors (gates, weights, bias, state) of the cell's op, and the segment ids."""

    cell: str

    tensors: list[Tensor]
    segment_ids: Tensor | None


def arguments(shape: Shape, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    def weights(rows: int) -> Tensor:
        return (normal(rows, shape.width) * shape.scale).clamp(-shape.clip, shape.clip)

    gates = normal(shape.batch, shape.time, shape.heads, 3, shape.channels).to(shape.dtype)
    parameters = [weights(3), 0.3 * normal(3, shape.width)]
    if shape.cell == "lstm":
        parameters.insert(1, weights(2))
    bounds = torch.tensor([1.0, LSTM_OUTPUT_BOUND], dtype=torch.float64)[:, None]
    state = torch.rand(shape.batch, 2, shape.width, generator=generator, dtype=torch.float64) * 2 - 1
    state = state[:, 0] if shape.cell == "gru" else state * bounds
    ids = None
    if shape.segments:
        ids = (torch.rand(shape.batch, shape.time, generator=generator) < 0.2).long().cumsum(1)
    work = torch.float64 if shape.dtype == torch.float64 else torch.float32
    tensors = [gates, *(x.to(work) for x in [*parameters, state])]
    tensors = [x.detach().requires_grad_() for x in tensors]
    return Arguments(shape.cell, tensors if shape.state else tensors[:-1], ids)


def solve(given: Arguments, solver: Solver | None = None) -> Solution:
    op = lstm if given.cell == "lstm" else gru
    return op(*given.tensors, segment_ids_BT=given.segment_ids, solver=solver)


def results(given: Arguments, solver: Solver | None = None, seed: int = 9) -> dict[str, Tensor]:
    """Output, final state and the gradients of all tensors, for a random cotangent of both."""
    solution = solve(given, solver)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (solution.output_BTD, solution.final_state)
    ]
    grads = torch.autograd.grad([solution.output_BTD, solution.final_state], given.tensors, cotangents)
    found = {"output": solution.output_BTD.detach(), "final state": solution.final_state.detach()}
    return found | {f"gradient {index}": grad for index, grad in enumerate(grads)}
