"""The cases on which attention is measured: inputs, FLOPs, and the clock.

Shape suffixes: B batch, T time, H heads, D head width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mask = Literal["full", "causal", "packed"]
TOKENS = 16384
FEATURES = 2048
MEAN_DOCUMENT = 1024
FLUSH_BYTES = 256 * 2**20  # five times Hopper's L2: every run finds it cold


@dataclass(frozen=True)
class Case:
    mask: Mask
    width: int
    time: int
    batch: int
    heads: int

    @property
    def name(self) -> str:
        return f"{self.mask} D{self.width} T{self.time}"


def document_ids(case: Case, device: torch.device) -> Tensor:
    """(B, T) ids of documents whose lengths are drawn from an exponential distribution of mean 1k."""
    random = torch.Generator().manual_seed(0)
    mean = min(MEAN_DOCUMENT, case.time // 4)
    ids = (torch.rand(case.batch, case.time, generator=random) < 1 / mean).long().cumsum(1)
    return ids.to(device)


def pairs(case: Case) -> int:
    """Pairs of positions that may meet, in the whole batch and in one head."""
    if case.mask == "full":
        return case.batch * case.time**2
    lengths = torch.full((case.batch,), case.time)
    if case.mask == "packed":
        ids = document_ids(case, torch.device("cpu"))
        lengths = torch.cat([row.unique_consecutive(return_counts=True)[1] for row in ids])
    return int((lengths * (lengths + 1) // 2).sum())


def flops(case: Case) -> dict[str, float]:
    forward = 4.0 * case.width * case.heads * pairs(case)
    return {"forward": forward, "backward": 2.5 * forward}


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    shape = (case.batch, case.time, case.heads, case.width)
    *qkv, grad = (torch.randn(shape, generator=random).to(device, dtype) for _ in range(4))
    return [x.requires_grad_() for x in qkv], grad


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, with the L2 cache cold on a GPU."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        return statistics.median(_wall(run) for _ in range(repeats))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
