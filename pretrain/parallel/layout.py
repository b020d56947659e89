"""Which layouts fit a world and a batch: arithmetic that whoever submits a run can do without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config import DataSection, ParallelSection


def data_parallel_size(parallel: ParallelSection, world: int, global_batch_rows: int) -> int:
    """Ranks that see different rows. Raises ConfigError where the layout does not fit the world or the batch."""
    model_ranks = parallel.tensor * parallel.context * parallel.pipeline
    problems = []
    if world % model_ranks:
        problems.append(
            f"parallel: tensor x context x pipeline = {model_ranks} does not divide the {world} processes; "
            f"start a multiple of {model_ranks}"
        )
    size = max(1, world // model_ranks)
    if parallel.data != "auto" and parallel.data != size:
        problems.append(
            f"parallel.data = {parallel.data}: {world} processes leave {size}; start {parallel.data * model_ranks} "
            "processes or use parallel.data=auto"
        )
    if global_batch_rows % size:
        right = [n for n in range(1, global_batch_rows + 1) if global_batch_rows % n == 0]
        problems.append(
            f"data.global_batch_rows = {global_batch_rows} does not divide by {size} data-parallel ranks; "
            f"use {', '.join(map(str, right[-6:]))} ranks or another batch"
        )
    if problems:
        raise ConfigError("layout error, " + f"{len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return size


def micro_batch_rows(data: DataSection, data_ranks: int) -> int:
    """Rows per forward pass of one rank: what the config says, at most all of the rank's rows."""
    rows = data.global_batch_rows // data_ranks
    if data.micro_batch_rows == "auto":
        return rows
    # The config's divisor of the whole batch may not divide one rank's share: take the largest that does.
    return max(n for n in range(1, min(data.micro_batch_rows, rows) + 1) if rows % n == 0)
