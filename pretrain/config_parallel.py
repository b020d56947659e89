"""Which layouts a model and its rows allow: one check per axis, all told at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pretrain.config_section import Problem

if TYPE_CHECKING:
    from pretrain.config import DataSection, ParallelSection


def check_tensor(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """Heads, channels and, with sequence parallelism, positions in equal parts. The vocabulary is filled up."""
    size = parallel.tensor
    for message in model.division_problems(size):
        right = [n for n in range(1, max(2, model.heads + 1)) if not model.division_problems(n)]
        yield Problem("parallel.tensor", f"{message}; use {_one_of(right)}", size, True)
    if parallel.sequence and size == 1:
        message = "the ranks of the tensor axis share the positions: set parallel.tensor above 1, or false"
        yield Problem("parallel.sequence", message, True, True)
    ranks = size * parallel.context
    if parallel.sequence and data.sequence_length % ranks:
        near = max(1, round(data.sequence_length / ranks)) * ranks
        message = (
            f"with parallel.sequence {ranks} ranks share a row's positions, and {data.sequence_length} do not divide "
            f"by {ranks}; use {near}, or parallel.sequence=false"
        )
        yield Problem("data.sequence_length", message, data.sequence_length, True)


def check_context(parallel: ParallelSection) -> Iterator[Problem]:
    if parallel.context > 1:
        yield Problem("parallel.context", "this version runs 1 only", parallel.context, True)


def check_pipeline(parallel: ParallelSection) -> Iterator[Problem]:
    if parallel.pipeline > 1:
        yield Problem("parallel.pipeline", "this version runs 1 only", parallel.pipeline, True)


def check_zero(parallel: ParallelSection) -> Iterator[Problem]:
    if parallel.zero_group == "node" and parallel.zero != 3:
        message = "only ZeRO 3 shares parameters: set parallel.zero=3, or all"
        yield Problem("parallel.zero_group", message, parallel.zero_group, True)


def _one_of(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
