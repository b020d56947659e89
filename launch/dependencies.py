"""What a job waits for, as Slurm's `dependency` has it: runs that must finish first, and its turn in a chain."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launch.job import LaunchedRun
from launch.policy import Ending
from pretrain.attempts import read_json
from pretrain.errors import UserError


def dependency_on(runs: Sequence[LaunchedRun]) -> str | None:
    """What Slurm must wait for until all of these runs have finished; None if they have. Raises UserError for one
    that never will."""
    parts = []
    for run in runs:
        if run.outcome_file.is_file():
            outcome = read_json(run.outcome_file)
            if outcome["ending"] != Ending.done:
                raise UserError(
                    f"--after {run.run.name}: it has ended: {outcome['message']}; launch it again first"
                )
            continue
        jobs = run.job()["jobs"]
        if len(jobs) < run.settings.copies:
            raise UserError(
                f"--after {run.run.name}: its jobs' numbers are not all known; is its submission going on, or was it "
                "interrupted?"
            )
        # Of a chain, the job that finishes the run is the only one that ends well.
        parts.append("?".join(f"afterok:{job}" for job in jobs))
    if len(parts) > 1 and any("?" in part for part in parts):
        raise UserError(
            "--after several runs, one of them a chain of jobs: Slurm cannot wait for that; name one run"
        )
    return ",".join(parts) or None


def jobs_in(dependency: str) -> list[str]:
    """The jobs' numbers in what `dependency_on` wrote."""
    return re.findall(r"afterok:([0-9_]+)", dependency)
