"""`triptych status`: runs and their jobs in one table, from squeue and the runs' own files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from launch import slurm
from launch.job import LaunchedRun
from launch.progress import Goodput, Progress, goodput, read_ledger, read_metrics, read_progress
from pretrain.attempts import read_json
from pretrain.errors import UserError


@dataclass(frozen=True)
class RunStatus:
    run: LaunchedRun
    jobs: list[slurm.QueuedJob]
    attempts: int
    progress: Progress
    goodput: Goodput
    outcome: str | None
    past: str | None = None
    """What the accounting says of a job that squeue has forgotten."""
    swept: Mapping[str, Any] = field(default_factory=dict)
    """Of a run of a sweep: the values that are its own, by key."""

    @property
    def state(self) -> str:
        """Slurm's word where it has one; else what the run says of itself."""
        if self.jobs and self.outcome is None:
            return self.jobs[0].state
        if self.outcome is None and self.past is not None:
            return self.past
        return self.outcome or ("not in the queue" if self.run.job()["jobs"] else "not on slurm")


def find_runs(folder: Path, names: Sequence[str]) -> list[LaunchedRun]:
    """The launched runs under `folder`, or those named, by name, pattern or path. Raises UserError."""
    if not names:
        return [LaunchedRun(path.parent.parent) for path in sorted(folder.glob("*/launch/job.json"))]
    found: list[LaunchedRun] = []
    for name in names:
        pattern = f"{name}/launch/job.json"
        found_there = [] if pattern.startswith("/") else sorted(folder.glob(pattern))
        launched = [path.parent.parent for path in found_there]
        if not launched and (Path(name) / "launch" / "job.json").is_file():
            launched = [Path(name)]
        if not launched:
            there = ", ".join(run.run.name for run in find_runs(folder, [])) or "none"
            raise UserError(f"{name!r}: no launched run of this name under {folder}; there are: {there}")
        found += [LaunchedRun(path) for path in launched if LaunchedRun(path) not in found]
    return found


def read_status(runs: Sequence[LaunchedRun]) -> tuple[list[RunStatus], str | None]:
    """Of each run; and why Slurm could not be asked, if it could not. One call for all of them."""
    jobs = {run.run: [str(job) for job in run.job()["jobs"]] for run in runs}
    queued, problem = [], None
    try:
        queued = slurm.queue([job for found in jobs.values() for job in found])
    except UserError as error:
        problem = str(error)
    by_job = {job.job: job for job in queued}
    known = {run.run: [by_job[job] for job in jobs[run.run] if job in by_job] for run in runs}
    forgotten = [run for run in runs if not known[run.run] and not run.outcome_file.is_file()]
    past = slurm.past_states([job for run in forgotten for job in jobs[run.run]]) if problem is None else {}
    last = {run.run: [past[job] for job in jobs[run.run] if job in past] for run in forgotten}
    return [_status(run, known[run.run], last.get(run.run, [])) for run in runs], problem


def _status(run: LaunchedRun, jobs: list[slurm.QueuedJob], past: Sequence[str]) -> RunStatus:
    live = sorted(jobs, key=lambda job: job.state != "RUNNING")
    outcome = read_json(run.outcome_file)["ending"] if run.outcome_file.is_file() else None
    ledger = read_ledger(run.run)
    used = goodput(ledger, read_metrics(run.run), now=_last_moment(ledger, live))
    progress, last = read_progress(run.run), past[-1] if past else None
    swept = run.job().get("swept", {})  # which a launch by an older version did not write
    return RunStatus(run, live, run.launch.current, progress, used, outcome, last, swept)


def _last_moment(ledger: Sequence[Mapping[str, Any]], jobs: Sequence[slurm.QueuedJob]) -> float:
    """Time counts while the job lives; afterwards it stopped with the ledger's last line."""
    if any(job.is_live for job in jobs):
        return time.time()
    return float(ledger[-1]["at"]) if ledger else time.time()


SORTS = ("name", "loss", "validation")


def sorted_by(key: str, statuses: Sequence[RunStatus]) -> list[RunStatus]:
    """By one of SORTS, the best first; what has no figure yet comes last."""
    if key not in SORTS:
        raise UserError(f"--sort {key}: one of {', '.join(SORTS)}")
    if key == "name":
        return list(statuses)

    def figure(status: RunStatus) -> float:
        found = status.progress.loss if key == "loss" else status.progress.validation_loss
        return math.inf if found is None else found

    return sorted(statuses, key=figure)


def status_table(statuses: Sequence[RunStatus]) -> Table:
    """A row per run; of sweeps a column per swept key."""
    swept = list(dict.fromkeys(key for status in statuses for key in status.swept))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "run",
        *swept,
        "job",
        "state",
        "reason",
        "attempts",
        "step",
        "loss",
        "validation",
        "tokens/s",
        "goodput",
        "saved",
        "left",
    ):
        table.add_column(
            name,
            justify="right" if name in ("step", "loss", "validation", "tokens/s", "attempts") else "left",
        )
    for status in statuses:
        progress = status.progress
        table.add_row(
            status.run.run.name,
            *(str(status.swept.get(key, "-")) for key in swept),
            status.jobs[0].job if status.jobs else "-",
            status.state.lower(),
            _reason(status),
            str(status.attempts),
            f"{progress.step:,}/{progress.steps:,}",
            "-" if progress.loss is None else f"{progress.loss:.4f}",
            "-" if progress.validation_loss is None else f"{progress.validation_loss:.4f}",
            "-" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}",
            f"{status.goodput.share:.0%}" if status.goodput.total else "-",
            _saved(progress),
            "-" if progress.seconds_left is None else duration(progress.seconds_left),
        )
    return table


def _reason(status: RunStatus) -> str:
    if not status.jobs or status.outcome is not None:
        return ""
    job = status.jobs[0]
    if job.state == "PENDING":
        until = "" if job.eligible in ("N/A", "") else f", from {job.eligible}"
        return f"{job.reason}{until}"
    if job.is_live or job.reason in ("None", ""):
        return job.nodes
    unseen = f"; do the nodes see {status.run.run}?" if job.reason == "JobLaunchFailure" else ""
    return f"{job.reason}{unseen}"


def _saved(progress: Progress) -> str:
    following = progress.seconds_to_save
    soon = "" if following is None or progress.step >= progress.steps else f", next in {duration(following)}"
    return f"{progress.saved_step:,}{soon}"


def duration(seconds: float) -> str:
    """1 d 3 h, 2 h 5 min, 3 min 20 s or 12 s."""
    whole = round(max(0.0, seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def goodput_table(status: RunStatus) -> Table:
    """Where one run's time went."""
    used = status.goodput
    table = Table("time", "seconds", "share", box=None, header_style="bold", pad_edge=False)
    for name, seconds in vars(used).items():
        table.add_row(
            name.replace("_", " "), f"{seconds:,.1f}", f"{seconds / used.total:.1%}" if used.total else "-"
        )
    return table
