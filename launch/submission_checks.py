"""What is refused before anything is submitted: layouts, times, datasets, partitions, a run that is in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch import slurm
from launch.dependencies import jobs_in
from launch.durations import minutes_of
from launch.job import LaunchedRun
from launch.request import Request
from pretrain.config.nearest import check_layout
from pretrain.errors import ConfigError, UserError
from pretrain.typed import typed_for_runs

LEAST_SECONDS_BEFORE_SIGNAL = 30
"""A job must have at least this long between its start and the request to save, or no step is ever saved."""


def check_shape(request: Request) -> None:
    """What can be known without Slurm. Raises ConfigError."""
    for config in request.configs:
        check_layout(config, request.ranks)
    settings = request.settings
    limit_s = 60 * minutes_of(settings.time)
    if limit_s < settings.signal_seconds + LEAST_SECONDS_BEFORE_SIGNAL:
        raise ConfigError(
            f"time = {settings.time}: the ranks are told to save {settings.signal_seconds} s before the limit, which "
            f"leaves {limit_s - settings.signal_seconds} s to train; allow more time, or lower signal_seconds"
        )


def check_data(request: Request) -> None:
    """Raises DataError for a dataset that is not there, which every rank would find after the queue.

    In a container, paths are the container's.
    """
    from data_pipelines.storage.dataset import read_dataset

    if request.settings.container is None:
        for path in dict.fromkeys(
            source.path for config in request.configs for source in config.data.sources
        ):
            read_dataset(Path(path)).split("train")


def check_cluster(request: Request) -> None:
    """What Slurm would refuse only after a while, or in its own words. Raises UserError."""
    slurm.require()
    if request.after is not None and "?" in request.after and request.copies > 1:
        raise UserError(
            "--after a chain of jobs, and a chain itself: Slurm cannot wait for both; leave one of them out"
        )
    if request.after is not None and not any(job.is_live for job in slurm.queue(jobs_in(request.after))):
        raise UserError(
            "--after: the job to wait for is not in the queue any more, and did not finish; launch it again"
        )
    known = slurm.partitions()
    wanted = request.settings.partition
    names = wanted.split(",") if wanted else [item.name for item in known if item.default]
    chosen = [item for item in known if item.name in names]
    if not names or len(chosen) < len(names):
        there = ", ".join(item.name for item in known) or "none"
        missing = f"partition = {wanted}: there is none" if wanted else "no default partition; name one"
        raise UserError(f"{missing}; there are: {there}")
    most = max(chosen, key=lambda item: item.nodes)
    if request.nodes > most.nodes:
        raise UserError(f"--nodes {request.nodes}: partition {most.name} has {most.nodes}")
    _check_time(request.settings.time, chosen)
    for run in request.runs:
        refuse_a_second_job(run)


def _check_time(wanted: str, chosen: Sequence[slurm.Partition]) -> None:
    """Slurm takes a job whose limit exceeds its partition's, and never starts it."""
    limits = [item.most_minutes for item in chosen]
    most = None if None in limits else max(limit for limit in limits if limit is not None)
    if most is not None and minutes_of(wanted) > most:
        allowed = ", ".join(f"{item.name} {item.time_limit}" for item in chosen)
        raise UserError(
            f"time = {wanted}: more than the partition allows ({allowed}); the run takes many jobs anyway"
        )


def refuse_a_second_job(run: LaunchedRun) -> None:
    """Raises UserError if a job of this run is in the queue."""
    if not run.job_file.is_file():
        return
    alive = [job for job in slurm.queue(run.job()["jobs"]) if job.is_live]
    if alive:
        states = ", ".join(f"{job.job} ({job.state.lower()})" for job in alive)
        raise UserError(
            f"{run.run}: launched already, job {states}; "
            f"`{typed_for_runs('cancel', run.run.name, run.run.parent)}` ends it, or choose another run.name"
        )
