"""What the batch script runs on the first node of the allocation, before and after the ranks.

    number=$(python -m launch.batch begin RUN) || exit
    srun ... the ranks ...
    python -m launch.batch end RUN --code $?

The policy is here and not in a rank: it works when rank 0 is dead, and with containers that have no Slurm inside.
Imports no torch: it answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launch import slurm
from launch.job import LaunchedRun
from launch.policy import Attempt, Decision, Ending, classify, decide, with_enough_nodes
from launch.preflight_reports import Verdict, judge
from launch.progress import last_sign_of_life, read_ledger, read_progress
from pretrain.attempts import ATTEMPT_VARIABLE, own_attempt, read_json, write_json
from pretrain.errors import UserError

T = TypeVar("T")

EXIT_NOTHING_TO_DO = 100
"""`begin`: the run has finished, or was given up; the batch script ends in peace."""
ROOM_WAIT_S, ROOM_PERIOD_S = 1800, 5
LEAST_WAIT_S = 20
"""Least seconds that the other ranks of a preflight have once one has ended."""
TIME_LIMIT = "TimeLimit"
"""Slurm's reason for a job that it ends at its time limit."""


def begin(run: LaunchedRun, job: str) -> int:
    """Number a new attempt, check the nodes, and print the number for the script. Returns the exit code."""
    if run.outcome_file.is_file():
        say(f"nothing to do: {read_json(run.outcome_file)['message']}")
        return EXIT_NOTHING_TO_DO
    when_there_is_room(run, lambda: close_unended(run))
    number = run.launch.current + 1
    nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    facts = {"job": job, "nodes": nodes, "step_before": run.newest_step()}
    when_there_is_room(run, lambda: run.launch.begin(number, **facts))
    when_there_is_room(run, lambda: run.launch.record("attempt", attempt=number, **facts))
    say(f"attempt {number} on {', '.join(nodes)}, from step {facts['step_before']}")
    settings = run.settings
    if settings.preflight.enabled:
        run.launch.attempt(number).tell("checking the nodes")
        folder = run.launch.attempt(number).path / "preflight"
        verdict = when_there_is_room(
            run, lambda: _preflight(run, folder, nodes, settings.preflight.seconds, attempt=number)
        )
        facts = {"bad_nodes": verdict.bad_nodes, "everywhere": verdict.everywhere, "figures": verdict.figures}
        when_there_is_room(run, lambda: run.launch.record("preflight", attempt=number, **facts))
        if not verdict.well:
            return when_there_is_room(run, lambda: _refuse(run, number, job, verdict))
    run.launch.attempt(number).tell("starting the ranks")
    print(number)
    return 0


def check(run: LaunchedRun, job: str) -> int:
    """The preflight alone: its verdict is the job's outcome. Nothing is trained, no attempt begins."""
    nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    folder = run.folder / "preflight" / job
    verdict = _preflight(run, folder, nodes, run.settings.preflight.seconds)
    run.launch.record("preflight", job=job, bad_nodes=verdict.bad_nodes, everywhere=verdict.everywhere)
    write_json(folder / "verdict.json", {"well": verdict.well, "message": str(verdict)})
    return EXIT_NOTHING_TO_DO if verdict.well else 1


def end(run: LaunchedRun, job: str, code: int) -> int:
    """Judge the attempt that has just ended, and act. Returns the exit code of the batch script."""
    _outlive_the_requeue()
    number = own_attempt() or run.launch.current
    folder = run.launch.attempt(number)
    current = read_json(run.folder / "attempt.json")
    settings = run.settings
    ranks = len(current["nodes"]) * settings.ranks_per_node
    ending, reason = classify(code, folder.exits(), fault=folder.fault.is_file(), ranks=ranks)
    bad_nodes: tuple[str, ...] = ()
    if folder.fault.is_file():
        found = read_json(folder.fault)
        reason, bad_nodes = found["reason"], (found["host"],)
    slurms_reason = None if ending is Ending.done else _why_slurm_ends(job)
    if _taken_over(run, number):  # asked last: Slurm's answer may have taken long
        return 1
    if slurms_reason == TIME_LIMIT:  # which Slurm does not requeue by itself
        reason = (
            f"{reason}; the time limit came, and signal_seconds = {settings.signal_seconds} did not suffice"
        )
    elif slurms_reason is not None:
        ending, reason, bad_nodes = Ending.cancelled, f"{reason}; cancelled or preempted", ()
    attempt = Attempt(number, ending, current["step_before"], run.newest_step(), reason, bad_nodes)
    return _act(run, job, attempt)


def _taken_over(run: LaunchedRun, number: int) -> bool:
    """Whether this script's node was cut off, and Slurm has started the job again elsewhere: that attempt is not this
    script's to judge."""
    newest = run.launch.current
    if newest > number:
        say(f"attempt {number} was given up, attempt {newest} has taken its place; nothing was done here")
    return newest > number


def _act(run: LaunchedRun, job: str, attempt: Attempt) -> int:
    settings = run.settings
    run.write_ended(attempt)
    decision = decide(
        run.ended_attempts(),
        most_without_progress=settings.attempts_without_progress,
        excluded=run.excluded,
    )
    if decision.action == "again" and decision.exclude:
        decision = with_enough_nodes(decision, _nodes_of_partition(), run.job()["nodes"])
    if decision.action == "again" and not settings.requeue and not _chain_goes_on(run, job):
        decision = Decision(
            "stop", f"the chain's jobs are used up; {_again_by_hand(run)} queues more ({decision.message})"
        )
    if not _stands_in_ledger(run, attempt.number):  # the disk may have been full at what came after it
        _record_end(run, attempt, decision=decision.message)
    say(f"attempt {attempt.number}: {decision.message}")
    if decision.action == "again":
        return _again(run, job, decision, requeues=settings.requeue)
    if attempt.ending is not Ending.cancelled:
        write_json(run.outcome_file, {"ending": attempt.ending, "message": decision.message})
        _cancel_the_rest(run, job)
    return 0 if decision.action == "finish" else 1


def _again_by_hand(run: LaunchedRun) -> str:
    command = run.job().get("command")
    return f"`{command}`" if command else "launching the run again"


def _again(run: LaunchedRun, job: str, decision: Decision, *, requeues: bool) -> int:
    run.exclude(decision.exclude)
    excluded = run.settings.excluding(decision.exclude) if decision.exclude else ""
    if not requeues:
        _exclude_from_the_rest(run, job, excluded)
        return 1  # the next job of the chain starts when this one has ended
    sys.stdout.flush()
    slurm.requeue(job, excluded)
    return 1


def _refuse(run: LaunchedRun, number: int, job: str, verdict: Verdict) -> int:
    """What the preflight found ends the attempt. Bad nodes are exchanged; a mistake would be found again."""
    _outlive_the_requeue()
    step = run.newest_step()
    if verdict.bad_nodes:
        ending = Ending.node_fault
    else:
        ending = Ending.crash if verdict.may_pass else Ending.configuration
    attempt = Attempt(number, ending, step, step, f"preflight: {verdict}", tuple(verdict.bad_nodes))
    _act(run, job, attempt)
    return 1


def _preflight(
    run: LaunchedRun, folder: Path, nodes: Sequence[str], seconds: int, *, attempt: int | None = None
) -> Verdict:
    """All nodes check themselves and each other in a step of their own, with a time limit of its own."""
    shutil.rmtree(folder, ignore_errors=True)  # of one that found no room for its reports
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | ({} if attempt is None else {ATTEMPT_VARIABLE: str(attempt)})
    # One that fails does not end the others at once: what they have to say tells which node it is.
    # Its output comes here over the network: a node that does not see the folder could not open a file in it.
    command = [
        "srun",
        "--kill-on-bad-exit=0",
        f"--wait={max(LEAST_WAIT_S, seconds // 5)}",
        "--label",
        *_container(run),
    ]
    command += [sys.executable, "-m", "launch.preflight", str(run.run), str(folder)]
    code: int | None = None
    with (folder / "ranks.log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        code = subprocess.run(
            command, env=environment, timeout=seconds, check=False, stdout=log, stderr=log
        ).returncode
    verdict = judge(folder, nodes, code=code, seconds=seconds)
    say(f"preflight: {verdict}")
    return verdict


def _container(run: LaunchedRun) -> list[str]:
    settings = run.settings
    if settings.container is None:
        return []
    mounts = [f"--container-mounts={','.join(settings.mounts)}"] if settings.mounts else []
    return [f"--container-image={settings.container}", *mounts]


def close_unended(run: LaunchedRun) -> None:
    """An attempt whose batch script died with its node left no verdict; its node is known by Slurm already."""
    number = run.launch.current
    if number == 0 or _stands_in_ledger(run, number):
        return
    attempt = run.ended_attempt(number)
    if attempt is None:
        before = read_json(run.folder / "attempt.json")["step_before"]
        reason = "the job was taken from its nodes: a node died, or Slurm preempted it"
        attempt = Attempt(number, Ending.cancelled, before, run.newest_step(), reason)
        run.write_ended(attempt)
    if attempt.bad_nodes:
        run.exclude(tuple(dict.fromkeys([*run.excluded, *attempt.bad_nodes])))
    # Not now: the job has waited in the queue since.
    ended = last_sign_of_life(run.run, number)
    _record_end(run, attempt, ended=ended)


def _stands_in_ledger(run: LaunchedRun, number: int) -> bool:
    """Whether the end of this attempt does: a script that was killed, or found no room, comes to it again."""
    lines = read_ledger(run.run)
    return any(line["event"] == "attempt_end" and line["attempt"] == number for line in lines)


def _record_end(run: LaunchedRun, attempt: Attempt, **facts: Any) -> None:
    run.launch.record(
        "attempt_end",
        attempt=attempt.number,
        ending=attempt.ending,
        reason=attempt.reason,
        step=attempt.step_after,
        last_step=read_progress(run.run).step,
        bad_nodes=list(attempt.bad_nodes),
        **facts,
    )


def _why_slurm_ends(job: str) -> str | None:
    """Slurm's reason if it is ending the job: that is not RUNNING any more, though its batch script still is."""
    try:
        found = slurm.queue([job], patience_s=slurm.CONTROLLER_AWAY_S)
    except UserError as error:
        say(str(error))
        return None
    return found[0].reason if found and found[0].state != "RUNNING" else None


def _other_jobs(run: LaunchedRun, job: str) -> list[str]:
    return [other for other in run.job()["jobs"] if other != job]


def _cancel_the_rest(run: LaunchedRun, job: str) -> None:
    """Of a chain: nothing is left for them to do."""
    for other in _other_jobs(run, job):
        try:
            slurm.call("scancel", "--state=PENDING", other)
        except UserError as error:
            say(str(error))


def _chain_goes_on(run: LaunchedRun, job: str) -> bool:
    """Whether a job is left to start when this one has ended."""
    if len(run.job()["jobs"]) < run.settings.copies:
        return True  # this one ended before the submission: not all of the others' numbers are written
    try:
        return any(other.state == "PENDING" for other in slurm.queue(_other_jobs(run, job)))
    except UserError as error:
        say(str(error))
        return True


def _nodes_of_partition() -> list[str] | None:
    """All of the job's partition; None if Slurm does not say."""
    try:
        return slurm.nodes_of(os.environ["SLURM_JOB_PARTITION"], patience_s=slurm.CONTROLLER_AWAY_S)
    except UserError as error:
        say(str(error))
        return None


def _exclude_from_the_rest(run: LaunchedRun, job: str, nodes: str) -> None:
    for other in _other_jobs(run, job) if nodes else []:
        try:
            slurm.call("scontrol", "update", f"JobId={other}", f"ExcNodeList={nodes}")
        except UserError as error:  # one that has run already
            say(str(error))


def _outlive_the_requeue() -> None:
    """Slurm ends the batch script of a job that is requeued, and there is still the ledger to write."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)


def when_there_is_room(run: LaunchedRun, act: Callable[[], T]) -> T:
    """What the verdict is written to may be the disk whose fullness ended the attempt. Whoever makes room there
    should not also have to find out which runs to start again: try for a while before the job is lost."""
    end_at = time.monotonic() + ROOM_WAIT_S
    while True:
        try:
            return act()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > end_at:
                raise
            with contextlib.suppress(OSError):  # the log may lie on the same disk
                say(
                    f"{run.run}: {error.strerror}; make room there: tried again for {ROOM_WAIT_S // 60} minutes"
                )
            time.sleep(ROOM_PERIOD_S)


def say(message: str) -> None:
    """To the job's log; standard output is for the script."""
    print(f"triptych: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.batch", description=__doc__)
    parser.add_argument("moment", choices=["begin", "check", "end"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=int, default=0, help="srun's exit code, for `end`")
    given = parser.parse_args(arguments)
    run, job = LaunchedRun(given.run), os.environ["SLURM_JOB_ID"]
    try:
        if given.moment == "end":
            return when_there_is_room(run, lambda: end(run, job, given.code))
        return begin(run, job) if given.moment == "begin" else check(run, job)
    except UserError as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
