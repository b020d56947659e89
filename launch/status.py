"""`triptych status`: runs and their jobs in one table, from squeue and the runs' own files."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from launch import slurm
from launch.job import LaunchedRun
from launch.policy import Ending
from launch.progress import (
    Goodput,
    Progress,
    goodput,
    read_logs,
    read_progress,
)
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
    was_cancelled: bool = False
    """By its own ledger."""
    slurm_answers: bool = True
    stage: tuple[str, float] | None = None
    """What its start-up is doing, and for how many seconds; None once it trains."""
    damaged_lines: int = 0
    """Of its ledger and log: what they said is not in the figures here."""

    @property
    def state(self) -> str:
        """Slurm's word where it has one; else what the run says of itself."""
        if self.outcome is not None:
            return self.outcome
        if self.jobs:
            return self.jobs[0].state
        if self.past is not None:
            return self.past
        if not self.run.job()["jobs"]:
            return "not on slurm"
        if self.was_cancelled:
            return "cancelled"
        return "not in the queue" if self.slurm_answers else "unknown"

    @property
    def is_live(self) -> bool:
        """Whether it runs, or will. A run here, without Slurm, is told by its stage or by nothing."""
        return self.outcome is None and any(job.is_live for job in self.jobs)

    @property
    def seconds_left(self) -> float | None:
        """None for a run that does not go on."""
        return self.progress.seconds_left if self.is_live else None

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, for `--json`."""
        job, progress = (self.jobs[0] if self.jobs else None), self.progress
        return {
            "run": self.run.run.name,
            "folder": str(self.run.run),
            "job": job.job if job else None,
            "state": self.state.lower(),
            "reason": reason(self),
            "nodes": job.nodes if job else None,
            "attempts": self.attempts,
            "stage": self.stage[0] if self.stage else None,
            "stage_seconds": self.stage[1] if self.stage else None,
            **asdict(progress),
            "seconds_left": self.seconds_left,
            "goodput": self.goodput.share if self.goodput.total else None,
            "seconds": asdict(self.goodput),
            "swept": dict(self.swept),
            "damaged_lines": self.damaged_lines,
        }


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
    return [
        _status(run, known[run.run], last.get(run.run, []), slurm_answers=problem is None) for run in runs
    ], problem


def _status(
    run: LaunchedRun, jobs: list[slurm.QueuedJob], past: Sequence[str], *, slurm_answers: bool
) -> RunStatus:
    live = sorted(jobs, key=lambda job: job.state != "RUNNING")
    outcome = read_json(run.outcome_file)["ending"] if run.outcome_file.is_file() else None
    logs = read_logs(run.run)
    ledger = logs.ledger
    used = goodput(ledger, logs.metrics, now=_last_moment(ledger, live))
    progress, last = read_progress(run.run), past[-1] if past else None
    swept = run.job().get("swept", {})  # which a launch by an older version did not write
    attempts = run.launch.current
    return RunStatus(
        run,
        live,
        attempts,
        progress,
        used,
        outcome,
        last,
        swept,
        damaged_lines=logs.damaged_lines,
        was_cancelled=_was_cancelled(ledger, [str(job) for job in run.job()["jobs"]]),
        slurm_answers=slurm_answers,
        stage=_stage(run, ledger, attempts) if outcome is None and any(job.is_live for job in live) else None,
    )


def _was_cancelled(ledger: Sequence[Mapping[str, Any]], jobs: Sequence[str]) -> bool:
    """Whether these jobs were cancelled, by `triptych cancel` or, as their last attempt found, by Slurm."""
    for event in reversed(ledger):
        if event["event"] == "cancel":
            return not set(jobs).isdisjoint(map(str, event.get("jobs", [])))
        if event["event"] == "attempt_end":
            return event.get("ending") == Ending.cancelled
        if event["event"] in ("attempt", "launch"):
            return False
    return False


def _stage(run: LaunchedRun, ledger: Sequence[Mapping[str, Any]], attempt: int) -> tuple[str, float] | None:
    """What the newest attempt does before its first step is done, and for how long."""
    own = [event["event"] for event in ledger if event.get("attempt") == attempt]
    told = run.launch.attempt(attempt).told()
    if told is None or "attempt_end" in own:
        return None
    stage, since = told
    if "start" in own and _newest_record(run.run) > since:
        return None
    return stage, max(0.0, time.time() - since)


def _newest_record(run: Path) -> float:
    """When the run last logged a step, seconds since 1970; 0 if it never did."""
    path = run / "logs" / "metrics.jsonl"
    return path.stat().st_mtime if path.is_file() and path.stat().st_size else 0.0


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
        found = _cells(status)
        table.add_row(
            found["run"],
            *(str(status.swept.get(key, "-")) for key in swept),
            *(text for key, text in found.items() if key != "run"),
        )
    return table


def _cells(status: RunStatus) -> dict[str, str]:
    """The texts of a row, by column."""
    progress = status.progress
    return {
        "run": status.run.run.name,
        "job": status.jobs[0].job if status.jobs else "-",
        "state": status.state.lower(),
        "reason": reason(status),
        "attempts": str(status.attempts),
        "step": f"{progress.step:,}/{progress.steps:,}",
        "loss": "-" if progress.loss is None else f"{progress.loss:.4f}",
        "validation": "-" if progress.validation_loss is None else f"{progress.validation_loss:.4f}",
        "tokens/s": "-" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f}",
        "goodput": f"{status.goodput.share:.0%}" if status.goodput.total else "-",
        "saved": _saved(status),
        "left": "-" if status.seconds_left is None else duration(status.seconds_left),
    }


def status_text(statuses: Sequence[RunStatus], width: int) -> Text:
    """The same where a table does not fit: some lines per run, none longer than `width`, nothing left out."""
    lines: list[str] = []
    for status in statuses:
        found = _cells(status)
        parts = [f"{key} {value}" for key, value in status.swept.items()]
        parts += [f"job {found['job']}"] if status.jobs else []
        parts += [found["state"], *([found["reason"]] if found["reason"] else [])]
        shown = ("attempts", "step", "loss", "validation", "tokens/s", "goodput", "saved", "left")
        parts += [f"{key} {found[key]}" for key in shown if found[key] != "-"]
        lines.append(found["run"])
        lines += _filled(parts, width)
    return Text("\n".join(lines))


def _filled(parts: Sequence[str], width: int) -> list[str]:
    """The parts with commas between them, each whole where a line can hold it, and indented."""
    lines, indent = [""], "  "
    for number, part in enumerate(parts):
        piece = part + ("," if number + 1 < len(parts) else "")
        longer = f"{lines[-1]} {piece}" if lines[-1] else indent + piece
        if len(longer) > width and lines[-1]:
            lines.append(indent + piece)
        else:
            lines[-1] = longer
    return [
        piece
        for line in lines
        for piece in (textwrap.wrap(line, max(20, width), subsequent_indent=indent * 2) or [line])
    ]


def reason(status: RunStatus) -> str:
    """Why it waits, where it runs and what its start-up is doing, or why it ended; and what could not be read."""
    damaged = status.damaged_lines
    lines = f"{damaged:,} damaged log line{'s' if damaged > 1 else ''} left out" if damaged else ""
    return "; ".join(filter(None, [_reason(status), lines]))


def _reason(status: RunStatus) -> str:
    if not status.jobs or status.outcome is not None:
        return ""
    job = status.jobs[0]
    if job.state == "RUNNING" and status.stage is not None:
        stage, seconds = status.stage
        return f"{job.nodes}: {stage} ({duration(seconds)})"
    if job.state == "PENDING":
        until = "" if job.eligible in ("N/A", "") else f", from {job.eligible}"
        return f"{job.reason}{until}"
    if job.is_live or job.reason in ("None", ""):
        return job.nodes
    unseen = f"; do the nodes see {status.run.run}?" if job.reason == "JobLaunchFailure" else ""
    return f"{job.reason}{unseen}"


def _saved(status: RunStatus) -> str:
    progress, following = status.progress, status.progress.seconds_to_save
    soon = (
        ""
        if following is None or not status.is_live or progress.step >= progress.steps
        else f", next in {duration(following)}"
    )
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
