"""The bodies of `status`, `logs`, `cancel` and `tensorboard`: what watches runs imports little, and answers at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launch import slurm
from launch.durations import minutes_of
from launch.job import LaunchedRun
from launch.status import (
    RunStatus,
    find_runs,
    goodput_table,
    read_status,
    sorted_by,
    status_table,
    status_text,
)
from pretrain.commands.console import WIDE, plain_console
from pretrain.errors import UserError
from pretrain.json_text import to_json
from pretrain.typed import RUNS, typed

FOLLOW_S = 0.5
ASK_SLURM_S = 15


def show_status(
    folder: Path,
    names: list[str],
    *,
    watch: float | None,
    details: bool,
    sort: str,
    json_output: bool = False,
) -> None:
    if json_output:
        if watch is not None:
            raise UserError("--json with --watch: one answer is one JSON value; leave --watch out")
        _print_json(folder, names, sort)
        return
    console = plain_console()
    if not find_runs(folder, names):
        console.print(f"no launched runs under {folder}; `triptych launch --help` says how to make one")
        return
    if watch is None:
        console.print(_view(folder, names, details, sort, console))
        return
    with Live(_view(folder, names, details, sort, console), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(watch)
                live.update(_view(folder, names, details, sort, console), refresh=True)
        except KeyboardInterrupt:
            return


def _print_json(folder: Path, names: list[str], sort: str) -> None:
    statuses, problem = read_status(find_runs(folder, names))
    facts = [status.facts() for status in sorted_by(sort, statuses)]
    print(to_json({"runs": facts, "problem": problem}, indent=1))


def overview(statuses: Sequence[RunStatus], console: Console) -> Table | Text:
    """A table where there is room for all of it, else some lines per run: nothing is cut off."""
    table = status_table(statuses)
    options = console.options.update(width=WIDE)
    needed = Measurement.get(console, options, table).maximum
    return table if needed <= console.width else status_text(statuses, console.width)


def _view(folder: Path, names: list[str], details: bool, sort: str, console: Console) -> Group:
    statuses, problem = read_status(find_runs(folder, names))
    statuses = sorted_by(sort, statuses)
    parts: list[Any] = [overview(statuses, console)]
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
        where = [] if folder == RUNS else ["--runs", str(folder)]
        raise UserError(f"name the runs to cancel; `{typed('status', *where)}` lists them")
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
