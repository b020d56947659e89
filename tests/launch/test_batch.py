"""What the batch script does with the end of an attempt, as it calls it; on machines without Slurm too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.batch import close_unended
from launch.job import LaunchedRun
from launch.policy import Attempt, Ending
from launch.progress import read_ledger
from launch.settings import ClusterSettings
from pretrain.attempts import ATTEMPT_VARIABLE, RankExit
from pretrain.errors import UserError

NOWHERE = "/usr/bin/nowhere"


def attempted(folder: Path, *codes: int, jobs: list[str], **settings_of: object) -> LaunchedRun:
    """A run in its first attempt, whose ranks have ended with these codes."""
    run = LaunchedRun(folder / "demo")
    values = {"tasks_per_node": 2, "gpus_per_node": 0, **settings_of}
    settings = ClusterSettings.model_validate(values)
    run.write_job(settings, nodes=1, name="demo", jobs=jobs)
    attempt = run.launch.begin(1, job="1", nodes=["node1"], step_before=0)
    for rank, code in enumerate(codes):
        attempt.record_exit(RankExit(rank, "node1", code, "why", None))
    return run


def end(run: LaunchedRun, code: int) -> subprocess.CompletedProcess[str]:
    """As the script of the first attempt calls it."""
    return subprocess.run(
        [sys.executable, "-m", "launch.batch", "end", str(run.run), "--code", str(code)],
        env={**os.environ, "SLURM_JOB_ID": "1", ATTEMPT_VARIABLE: "1", "PATH": NOWHERE},
        capture_output=True,
        text=True,
        timeout=60,
    )


def ends(run: LaunchedRun) -> list[str]:
    return [line["ending"] for line in read_ledger(run.run) if line["event"] == "attempt_end"]


def test_an_end_that_is_judged_twice_stands_in_the_ledger_once(tmp_path: Path) -> None:
    run = attempted(tmp_path, 0, 0, jobs=["1"])
    for _ in range(2):
        done = end(run, 0)
        assert done.returncode == 0 and "finished" in done.stderr, done.stderr
    assert ends(run) == ["done"] and run.outcome_file.is_file()


def test_a_judged_end_that_did_not_come_to_the_ledger_is_added(tmp_path: Path) -> None:
    run = attempted(tmp_path, jobs=["1"])
    run.write_ended(Attempt(1, Ending.node_fault, 0, 5, "a rank fell silent", ("node3",)))
    for _ in range(2):
        close_unended(run)
    assert ends(run) == ["node fault"] and run.excluded == ["node3"]


def test_a_script_whose_node_was_cut_off_does_not_judge_its_successor(tmp_path: Path) -> None:
    run = attempted(tmp_path, 0, 0, jobs=["1"])
    run.launch.begin(2, job="1", nodes=["node2"], step_before=5)
    done = end(run, 0)
    assert done.returncode == 1 and "attempt 2 has taken its place" in done.stderr
    assert ends(run) == [] and run.ended_attempts() == [] and not run.outcome_file.exists()


def test_an_attempt_that_nobody_judged_was_taken_from_its_nodes(tmp_path: Path) -> None:
    run = attempted(tmp_path, jobs=["1"])
    close_unended(run)
    assert ends(run) == ["cancelled"]
    assert run.ended_attempts()[0].reason.startswith("the job was taken from its nodes")


@pytest.mark.parametrize(
    ("jobs", "chain_jobs", "given_up"), [([], 8, False), (["1"], 8, False), (["1"], 1, True)]
)
def test_a_chain_whose_submission_goes_on_is_not_given_up(
    tmp_path: Path, jobs: list[str], chain_jobs: int, given_up: bool
) -> None:
    run = attempted(tmp_path, 1, 1, jobs=jobs, requeue=False, chain_jobs=chain_jobs)
    assert end(run, 1).returncode == 1
    assert run.outcome_file.is_file() == given_up and ends(run) == ["crash"]


@pytest.mark.parametrize(
    ("state", "known"), [("PENDING", True), ("COMPLETING", True), ("REQUEUED", True), ("CANCELLED", False)]
)
def test_a_requeue_whose_answer_was_lost_has_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, known: bool
) -> None:
    """No real Slurm loses an answer on demand."""
    programs = {
        "scontrol": f'[ $1 = update ] && echo "$@" > {tmp_path}/updated && exit 0; '
        "echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1",
        "squeue": f"echo '7|demo|{state}|None|N/A||0:00'",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if known:
        slurm.requeue("7", "node3")
        assert (tmp_path / "updated").read_text() == "update JobId=7 ExcNodeList=node3\n"
    else:
        with pytest.raises(UserError, match="scontrol refused"):
            slurm.requeue("7", "node3")
