"""Which layouts fit a world and a batch: arithmetic that whoever submits a run can do without torch."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.data import DataSection
from pretrain.config.section import Problem, one_of, told
from pretrain.config.sections import ParallelSection
from pretrain.errors import ConfigError

SHOWN = 4  # numbers of ranks that a message names


def world_problems(parallel: ParallelSection, world: int, global_batch_rows: int) -> Iterator[Problem]:
    """All that is wrong with a layout of so many processes, and with a step's rows on them."""
    model_ranks = _model_ranks(parallel)
    if world % model_ranks:
        message = (
            f"tensor x context x pipeline = {model_ranks} does not divide the number of processes, {world}; "
            f"start a multiple of {model_ranks}"
        )
        yield Problem("parallel", message)
    size = _data_ranks(parallel, world)
    if parallel.data != "auto" and parallel.data != size:
        message = (
            f"{world} process{'es leave' if world > 1 else ' leaves'} {size}; start {parallel.data * model_ranks}, or "
            "use parallel.data=auto"
        )
        yield Problem("parallel.data", message, parallel.data, True)
    if world % model_ranks == 0:
        yield from _row_problems(parallel, global_batch_rows, size)


def data_parallel_size(parallel: ParallelSection, world: int, global_batch_rows: int) -> int:
    """Ranks that see different rows. Raises ConfigError where the layout does not fit the world or the batch."""
    problems = list(world_problems(parallel, world, global_batch_rows))
    if problems:
        raise ConfigError(told("layout error", problems))
    return _data_ranks(parallel, world)


def micro_batch_rows(data: DataSection, data_ranks: int, parallel: ParallelSection) -> int:
    """Rows per forward pass of one rank: what the config says, at most all of the rank's rows.

    A pipeline wants several micro-batches: auto takes the most rows that leave four of them per stage, or as many as
    there can be. The layout must fit (`world_problems`).
    """
    rows = data.global_batch_rows // data_ranks
    stages, multiple = parallel.pipeline, _interleaved_stages(parallel)
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n % multiple == 0]
    assert fitting, "the layout was not checked: world_problems"
    if data.micro_batch_rows == "auto":
        wanted = 1 if stages == 1 else 4 * stages
        return max((n for n in fitting if rows // n >= wanted), default=fitting[0])
    # The config's divisor of the whole batch may not divide one rank's share: take the largest that does.
    return max((n for n in fitting if n <= data.micro_batch_rows), default=fitting[0])


def _row_problems(parallel: ParallelSection, rows: int, data_ranks: int) -> Iterator[Problem]:
    """What is wrong with so many rows of a step for so many data-parallel ranks."""
    stages = _interleaved_stages(parallel)
    if rows % data_ranks:
        right = [n for n in range(1, rows + 1) if rows % n == 0]
        near = sorted(sorted(right, key=lambda n: abs(n - data_ranks))[:SHOWN])
        message = (
            f"does not divide by {data_ranks} data-parallel ranks; use {one_of(near)} ranks, or a multiple "
            f"of {data_ranks * stages} rows"
        )
        yield Problem("data.global_batch_rows", message, rows, True)
    elif rows // data_ranks % stages:
        message = (
            f"{rows // data_ranks} rows per data-parallel rank make no multiple of {stages} micro-batches, which "
            f"parallel.pipeline = {stages} with pipeline_chunks above 1 takes; use a multiple of "
            f"{stages * data_ranks} rows, or parallel.pipeline_chunks=1"
        )
        yield Problem("data.global_batch_rows", message, rows, True)


def _interleaved_stages(parallel: ParallelSection) -> int:
    """An interleaved schedule takes multiples of so many micro-batches."""
    return parallel.pipeline if parallel.pipeline_chunks > 1 else 1


def _model_ranks(parallel: ParallelSection) -> int:
    return parallel.tensor * parallel.context * parallel.pipeline


def _data_ranks(parallel: ParallelSection, world: int) -> int:
    return max(1, world // _model_ranks(parallel))
