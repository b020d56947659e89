"""The same job on this machine, through submitit's local executor: several ranks, no queue, no requeue."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

from launch.job import LaunchedRun
from launch.own_code import python_path
from launch.policy import Attempt, Ending, classify
from launch.rank import TrainJob
from launch.request import Request
from pretrain.attempts import ATTEMPT_VARIABLE, write_json
from pretrain.errors import UserError
from pretrain.exit_codes import EXIT_DONE, EXIT_RESUME
from pretrain.terminal import outlive_terminal
from pretrain.typed import typed_for_runs

MINUTES = 60 * 24 * 365


def run_here(request: Request, say: Callable[[str], None]) -> int:
    """Run to the end and wait; the exit code. Ctrl-C ends the ranks, after they have saved."""
    import submitit

    if request.is_sweep or request.nodes != 1:
        raise UserError("--local is one run on this one machine: use --nodes 1, and no --sweep")
    run = request.runs[0]
    number, before = run.launch.current + 1, run.newest_step()
    facts = {"job": "local", "nodes": [socket.gethostname()], "step_before": before}
    run.launch.begin(number, **facts)
    run.launch.record("attempt", attempt=number, **facts)
    os.environ |= {
        ATTEMPT_VARIABLE: str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONPATH": python_path(run.code),
    }
    executor = submitit.LocalExecutor(folder=request.folder)
    executor.update_parameters(
        tasks_per_node=request.settings.ranks_per_node,
        gpus_per_node=request.settings.gpus_per_node,
        timeout_min=MINUTES,
    )
    outlive_terminal()  # the ranks go on and the verdict is written, whoever stops to read what is said here
    # Ctrl-C and the end of a terminal reach every process of it: the ranks install handlers that save, and submitit's
    # own process must leave them the time.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    job = executor.submit(TrainJob(str(run.run)))
    signal.signal(signal.SIGINT, previous[signal.SIGINT])
    if previous[signal.SIGHUP] is not signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    say(
        f"{request.ranks} ranks here; follow them with: {typed_for_runs('logs', run.run.name, run.run.parent, '-f')}"
    )
    try:
        job.wait()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGHUP):  # once is enough: the ranks are saving
            signal.signal(number, signal.SIG_IGN)
        say("asking the ranks to stop; they save first")
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process passes it on to the ranks
        job.wait()
    return _end(run, Attempt(number, Ending.crash, before, run.newest_step(), ""), request.ranks, say)


def _end(run: LaunchedRun, attempt: Attempt, ranks: int, say: Callable[[str], None]) -> int:
    """Write down how the attempt ended, as the batch script does for one on Slurm."""
    folder = run.launch.attempt(attempt.number)
    exits = folder.exits()
    worst = max((found.code for found in exits), default=1)
    ending, reason = classify(worst, exits, fault=folder.fault.is_file(), ranks=ranks)
    attempt = replace(attempt, ending=ending, reason=reason)
    run.write_ended(attempt)
    step = attempt.step_after
    run.launch.record("attempt_end", attempt=attempt.number, ending=ending, reason=reason, step=step)
    message = f"{ending}: {reason}; the newest checkpoint is of step {step}"
    write_json(run.outcome_file, {"ending": ending, "message": message})
    say(message)
    if ending is Ending.done:
        return EXIT_DONE
    return EXIT_RESUME if ending is Ending.resume else max(1, worst)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
