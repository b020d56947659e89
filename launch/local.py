"""The same job on this machine, through submitit's local executor: several ranks, no queue, no requeue."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from launch.job import LaunchedRun
from launch.rank import TrainJob
from launch.submit import Request
from pretrain.attempts import ATTEMPT_VARIABLE
from pretrain.errors import UserError

MINUTES = 60 * 24 * 365


def run_here(request: Request, say: Callable[[str], None]) -> int:
    """Run to the end and wait; the exit code of rank 0. Ctrl-C ends the ranks, after they have saved."""
    import submitit

    if request.is_sweep or request.nodes != 1:
        raise UserError("--local is one run on this one machine: use --nodes 1, and no --sweep")
    run = request.runs[0]
    number = run.launch.current + 1
    run.launch.begin(number, job="local", nodes=[socket.gethostname()], step_before=run.newest_step())
    os.environ |= {
        ATTEMPT_VARIABLE: str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "PYTHONPATH": os.pathsep.join([str(run.code), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    executor = submitit.LocalExecutor(folder=request.folder)
    executor.update_parameters(
        tasks_per_node=request.settings.ranks_per_node,
        gpus_per_node=request.settings.gpus_per_node,
        timeout_min=MINUTES,
    )
    job = executor.submit(TrainJob(str(run.run)))
    say(f"{request.ranks} ranks here; follow them with: triptych logs -f {run.run}")
    try:
        job.wait()
    except KeyboardInterrupt:
        say("asking the ranks to stop; they save first")
        job.cancel()
        job.wait()
    return _outcome(run, number)


def _outcome(run: LaunchedRun, number: int) -> int:
    exits = run.launch.attempt(number).exits()
    return exits[0].code if exits else 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
