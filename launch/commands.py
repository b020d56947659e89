"""The bodies of `launch`, `status`, `logs`, `cancel` and `tensorboard`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from launch import slurm
from launch.job import LaunchedRun
from launch.settings import ClusterSettings, load_settings, minutes_of
from launch.status import find_runs, goodput_table, read_status, sorted_by, status_table
from launch.submit import (
    Request,
    absolute,
    check_cluster,
    check_shape,
    dependency_on,
    prepare,
    refuse_a_second_job,
    script,
    submit,
    sweep_configs,
)
from pretrain.attempts import read_json
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder

FOLLOW_S = 0.5
ASK_SLURM_S = 15


@dataclass(frozen=True)
class LaunchOptions:
    cluster: Path | None
    settings: dict[str, Any]
    """Of the command line, over the cluster's file."""
    nodes: int | None
    sweep: tuple[str, ...]
    after: str | None
    preflight: bool | None
    preflight_only: bool
    local: bool
    dry_run: bool


def launch_run(path: str, overrides: list[str], options: LaunchOptions) -> int:
    """Submit, or run here, or print what would be submitted. Returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    request = _request(path, overrides, options)
    if options.preflight_only and (options.local or request.is_sweep):
        raise UserError(
            "--preflight-only checks the nodes that Slurm gives one run: leave out --local and --sweep"
        )
    check_shape(request)
    if options.dry_run:
        _print_plan(request, path, overrides, console)
        return 0
    if not options.local:
        check_cluster(request)
    elif shutil.which("squeue"):
        refuse_a_second_job(request.runs[0])
    for run in request.runs:
        RunFolder(run.run).create()
    prepare(request)
    if options.local:
        from launch.local import run_here

        return run_here(request, console.print)
    jobs = submit(request)
    if options.preflight_only:
        return _wait_for_verdict(request, jobs[0], console)
    _say_submitted(request, jobs, console)
    return 0


def _wait_for_verdict(request: Request, job: str, console: Console) -> int:
    """Show what the preflight found; 0 if all is well. Ctrl-C leaves the job in the queue."""
    path = request.runs[0].folder / "preflight" / job / "verdict.json"
    with console.status(f"job {job} checks {request.nodes} nodes ..."):
        while not path.is_file():
            found = slurm.queue([job])
            if not found or not found[0].is_live:
                break
            time.sleep(FOLLOW_S)
    if not path.is_file():
        raise UserError(f"job {job} ended without a verdict; see {request.folder}/{job}_0_log.out")
    verdict = read_json(path)
    console.print(verdict["message"], markup=False)
    return 0 if verdict["well"] else 1


def _request(path: str, overrides: list[str], options: LaunchOptions) -> Request:
    configs = (
        sweep_configs(path, overrides, options.sweep) if options.sweep else (load_config(path, overrides),)
    )
    first = configs[0]
    settings = load_settings(
        options.cluster, dict(options.settings), {"gpus_per_node": first.launch.gpus_per_node}
    )
    settings = _with_preflight(settings, options)
    return Request(
        name=load_config(path, overrides).run.name,
        configs=tuple(absolute(config) for config in configs),
        settings=settings,
        nodes=options.nodes or (1 if options.local else first.launch.nodes),
        after=None
        if options.after is None
        else dependency_on(find_runs(Path(first.run.folder), [options.after])),
        preflight_only=options.preflight_only,
    )


def _with_preflight(settings: ClusterSettings, options: LaunchOptions) -> ClusterSettings:
    wanted = True if options.preflight_only else options.preflight
    if wanted is None:
        return settings
    preflight = settings.preflight.model_copy(update={"enabled": wanted})
    return settings.model_copy(update={"preflight": preflight})


def _print_plan(request: Request, path: str, overrides: list[str], console: Console) -> None:
    console.print(script(request), markup=False)
    if request.is_sweep:
        for run in request.runs:
            console.print(f"# run: {run.run.name}")
    from pretrain.commands.plan import print_plan

    try:
        print_plan(path, overrides, gpus=request.ranks, gpu="h100", mfu=0.4, price=None)
    except UserError as error:  # e.g. a vocabulary that a dataset, not built yet, will decide
        console.print(f"# no plan: {error}", markup=False)


def _say_submitted(request: Request, jobs: Sequence[str], console: Console) -> None:
    shape = f"{request.nodes} nodes x {request.settings.ranks_per_node} ranks"
    console.print(f"job {', '.join(jobs)}: {request.name}, {shape}")
    if request.excluded:
        path = request.runs[0].excluded_file
        console.print(
            f"without {', '.join(request.excluded)}, found bad before; to have them again, delete {path}"
        )
    name = f"'{request.name}-*'" if request.is_sweep else request.name
    folder = request.runs[0].run.parent
    runs = "" if folder == Path("runs").resolve() else f" --runs {folder}"
    for verb, what in (("status", "where it is:"), ("logs -f", "its output: "), ("cancel", "to end it:  ")):
        target = request.runs[0].run.name if verb == "logs -f" else name
        console.print(f"{what}  triptych {verb} {target}{runs}")


# --------------------------------------------------------------------------------------------- status, logs


def show_status(folder: Path, names: list[str], *, watch: float | None, details: bool, sort: str) -> None:
    console = Console(highlight=False)
    if not find_runs(folder, names):
        console.print(f"no launched runs under {folder}; `triptych launch CONFIG` makes one")
        return
    if watch is None:
        console.print(_view(folder, names, details, sort))
        return
    with Live(_view(folder, names, details, sort), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(watch)
                live.update(_view(folder, names, details, sort), refresh=True)
        except KeyboardInterrupt:
            return


def _view(folder: Path, names: list[str], details: bool, sort: str) -> Group:
    statuses, problem = read_status(find_runs(folder, names))
    statuses = sorted_by(sort, statuses)
    parts: list[Any] = [status_table(statuses)]
    if problem is not None:
        parts.append(f"Slurm's part is missing: {problem}")
    for status in statuses if details else []:
        parts += ["", f"{status.run.run.name}:", goodput_table(status), *_ledger_lines(status.run)]
    return Group(*parts)


def _ledger_lines(run: LaunchedRun) -> list[str]:
    path = run.run / "ledger.jsonl"
    return path.read_text(encoding="utf-8").splitlines()[-20:] if path.is_file() else []


def show_logs(folder: Path, name: str, *, follow: bool, rank: int, attempt: int | None, lines: int) -> None:
    run = find_runs(folder, [name])[0]
    number = attempt or run.launch.current
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(run, rank, max(1, number), lines, later=attempt is None)
        return
    path = run.log(rank, number)
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.glob("rank-*.log"))) or "none yet"
        raise UserError(f"{path}: no such log; there are: {there}")
    _print_new(path, 0, lines)


def _follow(run: LaunchedRun, rank: int, number: int, lines: int, *, later: bool) -> None:
    """Print a rank's log as it is written, from its last `lines`; `later`: then those of the attempts that follow,
    until the run has ended."""
    read, asked, lives = 0, time.monotonic(), True
    while True:
        if time.monotonic() - asked > ASK_SLURM_S:
            asked, lives = time.monotonic(), _lives(run)
        # Asked before the log is read: what was written until then is in it.
        ended, newest = run.outcome_file.is_file() or not lives, run.launch.current
        path = run.log(rank, number)
        if path.is_file():
            read = _print_new(path, read, lines if read == 0 else None)
        if newest > number and later:
            number, read, lines = number + 1, 0, sys.maxsize
        elif ended or newest > number:
            return
        else:
            time.sleep(FOLLOW_S)


def _lives(run: LaunchedRun) -> bool:
    """Whether a job of the run is in the queue; where Slurm does not answer, it is taken to be."""
    try:
        return any(job.is_live for job in slurm.queue(run.job()["jobs"]))
    except UserError:
        return True


def _print_new(path: Path, start: int, lines: int | None) -> int:
    """Print what the file holds from `start`, or the last `lines` of it. Returns its end."""
    with path.open("rb") as file:
        file.seek(start)
        found = file.read()
    shown = found if lines is None else b"".join(found.splitlines(keepends=True)[-lines:])
    print(shown.decode(errors="replace"), end="", flush=True)
    return start + len(found)


def cancel_runs(folder: Path, names: list[str]) -> None:
    """scancel of the runs' jobs that still live. Raises UserError if none is named."""
    if not names:
        raise UserError("name the runs to cancel, e.g. `triptych cancel demo`; `triptych status` lists them")
    for run in find_runs(folder, names):
        alive = [job.job for job in slurm.queue(run.job()["jobs"]) if job.is_live]
        if not alive:
            print(f"{run.run.name}: no job of it is in the queue")
            continue
        slurm.call("scancel", *alive)
        run.launch.record("cancel", jobs=alive)
        print(f"{run.run.name}: asked Slurm to end job {', '.join(alive)}")


# ----------------------------------------------------------------------------------------------- TensorBoard


def start_tensorboard(
    folder: Path, port: int, *, slurm: bool, partition: str | None, time_limit: str
) -> None:
    program = shutil.which("tensorboard") or str(Path(sys.executable).parent / "tensorboard")
    if not Path(program).is_file():
        raise UserError("tensorboard is not installed here; `pip install tensorboard`")
    if slurm and port == 0:
        raise UserError("--slurm with --port 0: the ssh line must name the port; choose one")
    command = [program, "--logdir", str(folder.resolve()), "--port", str(port)]
    if not slurm:
        os.execv(program, command)
    _submit_tensorboard([*command, "--host", "0.0.0.0"], port, partition, time_limit)


def _submit_tensorboard(command: list[str], port: int, partition: str | None, time_limit: str) -> None:
    slurm.require()
    wanted = [
        "sbatch",
        "--parsable",
        "--job-name=tensorboard",
        f"--time={minutes_of(time_limit)}",
        "--ntasks=1",
    ]
    if partition:
        wanted.append(f"--partition={partition}")
    job = slurm.call(*wanted, "--output=/dev/null", "--wrap", shlex.join(command)).strip()
    print(f"job {job} starts TensorBoard; `scancel {job}` ends it")
    node = _wait_for_node(job)
    if node is None:
        print(f"it does not run yet; NODE below is what `squeue -j {job} -o %N` shows once it does")
        node = "NODE"
    login = os.environ.get("SLURM_SUBMIT_HOST") or os.uname().nodename
    print(f"on your own machine:  ssh -L {port}:{node}:{port} {os.environ.get('USER', 'you')}@{login}")
    print(f"then open:            http://localhost:{port}")


def _wait_for_node(job: str, timeout_s: float = 60) -> str | None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = slurm.queue([job])
        if found and found[0].state == "RUNNING":
            return found[0].nodes
        if found and not found[0].is_live:
            raise UserError(f"job {job}: {found[0].state.lower()} ({found[0].reason})")
        time.sleep(1)
    return None
