"""The batch script: submitit's, with what runs before and after the ranks (`launch.batch`)."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from launch.batch import EXIT_NOTHING_TO_DO
from launch.durations import minutes_of
from launch.own_code import python_path, trusted_modules
from launch.request import Request
from launch.settings import ClusterSettings
from pretrain.attempts import ATTEMPT_VARIABLE

RECORDED_COLLECTIVES = 2000


def script(request: Request) -> str:
    """The whole batch script, as submitit will submit it."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(request.folder))}"
    count = len(request.configs) if request.is_sweep else None
    text: str = _make_sbatch_string(
        command=command, folder=request.folder, map_count=count, **script_parameters(request)
    )
    return text


def script_parameters(request: Request) -> dict[str, Any]:
    """What submitit makes the batch script of."""
    settings = request.settings
    extra: dict[str, Any] = {
        "chdir": str(request.runs[0].code),  # before PYTHONPATH in the order of imports
        "requeue" if settings.requeue else "no-requeue": True,
        **settings.sbatch,
    }
    if request.after is not None:
        extra["kill-on-invalid-dep"] = "yes"
    if request.excluded:
        extra["exclude"] = settings.excluding(request.excluded)
    given = {
        "job_name": request.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": minutes_of(settings.time),
        "nodes": request.nodes,
        "ntasks_per_node": settings.ranks_per_node,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task,
        "exclusive": settings.exclusive or None,
        "dependency": _dependency(request),
    }
    return {
        **{key: value for key, value in given.items() if value is not None},
        "signal_delay_s": settings.signal_seconds,
        "stderr_to_stdout": True,
        "setup": _before(request),
        "srun_args": _srun_arguments(settings),
        "teardown": _after(),
        "additional_parameters": extra,
    }


def _dependency(request: Request) -> str | None:
    turn = "singleton" if request.copies > 1 else None
    return ",".join(part for part in (request.after, turn) if part is not None) or None


def _srun_arguments(settings: ClusterSettings) -> list[str]:
    # Without the first two a rank that is killed leaves the others waiting for ever.
    arguments = ["--kill-on-bad-exit=1", f"--wait={settings.wait_seconds}", "--open-mode=append"]
    if settings.container is not None:
        arguments.append(f"--container-image={settings.container}")
        if settings.mounts:
            arguments.append(f"--container-mounts={','.join(settings.mounts)}")
    return arguments


def _before(request: Request) -> list[str]:
    python = shlex.quote(sys.executable)
    path = shlex.quote(python_path(request.runs[0].code))
    moment = "check" if request.preflight_only else "begin"
    if request.is_sweep:
        listed = shlex.quote(str(request.folder / "runs.txt"))
        run = f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {listed})'
    else:
        run = f"run={shlex.quote(str(request.runs[0].run))}"
    return [
        "trap : TERM  # what is below still runs after a preemption",
        f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUNBUFFERED=1",
        # How many collectives torch's flight recorder keeps; a hang then shows which rank waits in which.
        f"export TORCH_FR_BUFFER_SIZE={RECORDED_COLLECTIVES} TORCH_NCCL_TRACE_BUFFER_SIZE={RECORDED_COLLECTIVES}",
        *trusted_modules(),
        *_cpus_of_steps(request.settings),
        *request.settings.setup,
        run,
        f'{ATTEMPT_VARIABLE}=$({python} -m launch.batch {moment} "$run"); code=$?',
        f"[ $code -eq {EXIT_NOTHING_TO_DO} ] && exit 0",
        "[ $code -ne 0 ] && exit $code",
        f"export {ATTEMPT_VARIABLE}",
    ]


def _cpus_of_steps(settings: ClusterSettings) -> list[str]:
    """Since Slurm 22.05 srun does not take --cpus-per-task from its job, and each rank would get one core."""
    return [] if settings.cpus_per_task is None else [f"export SRUN_CPUS_PER_TASK={settings.cpus_per_task}"]


def _after() -> list[str]:
    python = shlex.quote(sys.executable)
    return [
        "code=$?",
        "trap '' TERM CONT  # the verdict outlives what ends the job",
        f'{python} -m launch.batch end "$run" --code $code',
        "exit $?",
    ]
