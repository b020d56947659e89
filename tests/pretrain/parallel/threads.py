"""The exchange of ranks that share rows, between threads of one process: quick enough for many examples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.parallel.exchange import Exchange

T = TypeVar("T")
WAIT_S = 20.0


class ThreadExchange(Exchange):
    """`Exchange` by a table that all threads write and read. `sent` counts the elements a rank sends to others."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(table)
        self.sent = 0
        self._table = table
        self._barrier = barrier

    def _all(self, x: Tensor) -> list[Tensor]:
        self._table[self.rank] = x
        self._barrier.wait(WAIT_S)
        everybody = list(self._table)
        self._barrier.wait(WAIT_S)
        assert len({one.shape for one in everybody}) == 1, "ranks bring tensors of different shapes"
        return everybody

    def gather(self, x: Tensor) -> Tensor:
        self.sent += (self.size - 1) * x.numel()
        return torch.stack(self._all(x))

    def scatter_sum(self, x_P: Tensor) -> Tensor:
        self.sent += x_P.numel() - x_P[0].numel()
        return torch.stack([one[self.rank] for one in self._all(x_P)]).sum(0)

    def swap(self, x_P: Tensor) -> Tensor:
        self.sent += x_P.numel() - x_P[0].numel()
        return torch.stack([one[self.rank] for one in self._all(x_P)])

    def maximum(self, x: Tensor) -> Tensor:
        self.sent += x.numel()
        return torch.stack([one.nan_to_num(nan=torch.inf, posinf=torch.inf) for one in self._all(x)]).amax(0)

    def _shift(self, x: Tensor, by: int) -> Tensor:
        self.sent += x.numel() if 0 <= self.rank + by < self.size else 0
        everybody, other = self._all(x), self.rank - by
        return everybody[other].clone() if 0 <= other < self.size else torch.zeros_like(x)


def run_threads(ranks: int, function: Callable[[ThreadExchange], T]) -> list[T]:
    """The function's results on each of the ranks, by rank."""
    table: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        tasks = [pool.submit(function, ThreadExchange(rank, table, barrier)) for rank in range(ranks)]
        return [task.result() for task in tasks]
