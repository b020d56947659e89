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


def check_layout(parallel: ParallelSection, data: DataSection, world: int) -> None:
    """Raises ConfigError where a layout does not fit the processes, or a step's rows do not fit the layout."""
    micro_batch_rows(data, data_parallel_size(parallel, world, data.global_batch_rows), parallel)


def micro_batch_rows(data: DataSection, data_ranks: int, parallel: ParallelSection | None = None) -> int:
    """Rows per forward pass of one rank: what the config says, at most all of the rank's rows.

    parallel: a pipeline wants several micro-batches; auto takes the most rows that leave four of them per stage, or
        as many as there can be. Raises ConfigError where an interleaved schedule cannot deal them out.
    """
    rows = data.global_batch_rows // data_ranks
    stages = 1 if parallel is None else parallel.pipeline
    multiple = stages if parallel is not None and parallel.pipeline_chunks > 1 else 1
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n % multiple == 0]
    if not fitting:
        raise ConfigError(
            f"data.global_batch_rows = {data.global_batch_rows}: {rows} rows per data-parallel rank make no multiple "
            f"of {stages} micro-batches, which parallel.pipeline = {stages} with pipeline_chunks above 1 takes; use a "
            f"multiple of {stages * data_ranks} rows, or parallel.pipeline_chunks=1"
        )
    if data.micro_batch_rows == "auto":
        wanted = 1 if stages == 1 else 4 * stages
        return max((n for n in fitting if rows // n >= wanted), default=fitting[0])
    # The config's divisor of the whole batch may not divide one rank's share: take the largest that does.
    return max((n for n in fitting if n <= data.micro_batch_rows), default=fitting[0])
