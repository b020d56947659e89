"""Submits a request: writes what the jobs will read, and queues them through submitit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch import slurm
from launch.batch_script import script_parameters
from launch.rank import TrainJob
from launch.request import Request
from launch.snapshot import take_snapshot
from pretrain.config import Config
from pretrain.errors import UserError


def prepare(request: Request) -> None:
    """Write what the job will read: snapshots, configs, settings. A run that had ended may start again."""
    for config, run in zip(request.configs, request.runs, strict=True):
        run.folder.mkdir(parents=True, exist_ok=True)
        take_snapshot(run, config)
        if not request.preflight_only:
            run.outcome_file.unlink(missing_ok=True)
        swept = {key: _setting(config, key) for key in request.swept}
        run.write_job(
            request.settings,
            nodes=request.nodes,
            name=request.name,
            jobs=[],
            swept=swept,
            command=request.command,
        )
    if request.is_sweep:
        request.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{run.run}\n" for run in request.runs)
        (request.folder / "runs.txt").write_text(lines, encoding="utf-8")


def _setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    found: Any = config.to_dict()
    for part in key.split("."):
        found = found[part]
    return found


def submit(request: Request) -> list[str]:
    """Submit through submitit; the jobs' numbers. Raises UserError with sbatch's refusal and its likely cause."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=request.folder)
    executor.update_parameters(**script_parameters(request))
    functions = [TrainJob(str(run.run)) for run in request.runs]
    jobs: list[list[str]] = [[] for _ in functions]
    try:
        for _ in range(request.copies):
            if len(functions) == 1:
                jobs[0].append(str(executor.submit(functions[0]).job_id))
            else:
                submitted = executor.map_array(_run, functions)
                for found, job in zip(jobs, submitted, strict=True):
                    found.append(str(job.job_id))
            # At once: the first job of a chain may end before the last one is queued.
            _write_jobs(request, jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        if any(jobs):  # a chain of which a limit allowed a part: all of it, or nothing
            slurm.call("scancel", *(job for found in jobs for job in found))
            _write_jobs(request, [[] for _ in jobs])
        raise UserError(slurm.explain("sbatch", str(error))) from None
    for run, found in zip(request.runs, jobs, strict=True):
        run.launch.record("launch", jobs=found, nodes=request.nodes, ranks=request.ranks)
    return [job for found in jobs for job in found]


def _write_jobs(request: Request, jobs: Sequence[list[str]]) -> None:
    for run, found in zip(request.runs, jobs, strict=True):
        run.write_jobs(found)


def _run(job: TrainJob) -> None:
    job()
