"""What `launch/` costs, on a real Slurm of four nodes that this starts on this machine, as root.

python -m benchmarks.launch --out benchmarks/results/launch.json

Four figures: the start of the cluster that the drills run on; `triptych status` beside a queue of 200 jobs; the time
from `triptych launch` to the first step, without and with the preflight; and the time from `kill -9` of a rank until
the run trains again, cut where the batch script hands over to Slurm and back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from launch.job import LaunchedRun
from launch.settings import ClusterSettings
from pretrain.attempts import read_json
from pretrain.json_text import to_json
from tests.corpus import build_corpus
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.drill import Drill

JOBS = 200
LOGGED_STEPS = 500
STATUS_CALLS = 5
STARTS = 3


@contextlib.contextmanager
def started(seconds: list[float]) -> Iterator[Cluster]:
    """A cluster; how long it took to come up joins `seconds`."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    began = time.perf_counter()
    try:
        cluster.start()
        seconds.append(time.perf_counter() - began)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def status_seconds(cluster: Cluster, folder: Path) -> list[float]:
    """Of the whole command, with `JOBS` runs whose jobs wait in the queue and which have trained for a while."""
    array = [
        "sbatch",
        "--parsable",
        "--hold",
        f"--array=0-{JOBS - 1}",
        "--output=/dev/null",
        "--wrap",
        "true",
    ]
    job = cluster.call(*array)
    for number in range(JOBS):
        write_run(LaunchedRun(folder / f"run-{number:03d}"), f"{job}_{number}")
    command = [sys.executable, "-m", "launch.cli", "status", "--runs", str(folder)]
    seconds = []
    for _ in range(STATUS_CALLS):
        began = time.perf_counter()
        done = subprocess.run(
            command,
            env={**cluster.environment, "COLUMNS": "250"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        seconds.append(time.perf_counter() - began)
        shown = sum("run-" in line and "pending" in line for line in done.stdout.splitlines())
        assert shown == JOBS, f"{shown} of {JOBS} runs are shown as pending"
    cluster.call("scancel", job)
    return seconds


def write_run(run: LaunchedRun, job: str) -> None:
    """The files of a launched run: its job, a ledger with one attempt, and a log of some hundred steps."""
    (run.run / "logs").mkdir(parents=True)
    run.folder.mkdir()
    run.write_job(ClusterSettings(), nodes=2, name=run.run.name, jobs=[job])
    run.launch.begin(1, job=job, nodes=["node1", "node2"], step_before=0)
    run.launch.record("attempt", attempt=1, job=job, nodes=["node1", "node2"], step_before=0)
    run.launch.record("start", step=0, world=4, attempt=1)
    (run.run / "config.yaml").write_text(
        f"run: {{steps: {2 * LOGGED_STEPS}}}\ncheckpoint: {{save_every_steps: 100}}\n"
    )
    with (run.run / "logs" / "metrics.jsonl").open("w") as file:
        for step in range(1, LOGGED_STEPS + 1):
            record = {
                "step": step,
                "loss/train": 5.0,
                "speed/tokens_per_second": 1e5,
                "speed/step_seconds": 1.0,
            }
            record |= {"speed/data_wait_share": 0.01, "optimizer/gradient_norm": 1.0, "optimizer/lr": 1e-3}
            file.write(to_json(record) + "\n")


@dataclass(frozen=True)
class Restart:
    """Seconds of one restart."""

    noticed: float
    """From the kill to the verdict: srun ends the other ranks, the batch script judges."""
    slurm: float
    """From the verdict to the next attempt's begin: Slurm ends the job, waits, and starts it again."""
    started: float
    """From there to the first step: imports, the model, the checkpoint."""

    @property
    def total(self) -> float:
        return self.noticed + self.slurm + self.started


@dataclass(frozen=True)
class Start:
    """Seconds from the command to the first step."""

    command: float
    """`triptych launch` itself."""
    ranks: float
    """From its return to the first logged step: Slurm, the preflight if there is one, the ranks."""

    @property
    def total(self) -> float:
        return self.command + self.ranks


def start_seconds(cluster: Cluster, corpus: Path, folder: Path, *, preflight: bool) -> Start:
    """Of a run of 2 nodes x 2 ranks."""
    folder.mkdir()
    drill = Drill(cluster, corpus, folder)
    began = time.perf_counter()
    run = drill.launch("--preflight" if preflight else "--no-preflight")
    launched = time.perf_counter()
    drill.wait_step(run, 1, timeout_s=200)
    stepped = time.perf_counter()
    drill.wait_finished(run)
    return Start(launched - began, stepped - launched)


def restart_seconds(cluster: Cluster, corpus: Path, folder: Path) -> Restart:
    """Of a run of 2 nodes x 2 ranks, one of which is killed."""
    drill = Drill(cluster, corpus, folder)
    run = drill.launch()
    drill.wait_step(run, 8)
    killed = time.time()
    os.kill(drill.rank(run, 3).pid, signal.SIGKILL)
    drill.wait_attempt(run, 2)
    trained = drill.step(run)
    drill.wait(lambda: drill.step(run) > trained, 60, "a step of attempt 2", run)
    training = time.time()
    # The files that say so, and not the ledger, whose times are whole seconds.
    verdict = (run.launch.attempt(1).path / "ended.json").stat().st_mtime
    begun = read_json(run.launch.path / "attempt.json")["since"]
    drill.wait_finished(run)
    return Restart(verdict - killed, begun - verdict, training - begun)


def measure() -> dict[str, Any]:
    starts: list[float] = []
    for _ in range(STARTS - 1):
        with started(starts):
            pass
    with started(starts) as cluster, tempfile.TemporaryDirectory() as folder:
        status = status_seconds(cluster, Path(folder) / "many")
        for name in ("drill", "corpus"):
            (Path(folder) / name).mkdir()
        corpus = build_corpus(Path(folder) / "corpus", documents=20)
        firsts = {
            name: [
                start_seconds(cluster, corpus, Path(folder) / f"{name}-{number}", preflight=preflight)
                for number in range(STARTS)
            ]
            for name, preflight in (("without", False), ("with", True))
        }
        restart = restart_seconds(cluster, corpus, Path(folder) / "drill")
    return {
        "cluster_start_seconds": starts,
        "status_seconds": status,
        "status_jobs": JOBS,
        "first_step": {
            name: [{**vars(start), "total": start.total} for start in starts]
            for name, starts in firsts.items()
        },
        "restart": {**vars(restart), "total": restart.total},
    }


def show(found: dict[str, Any]) -> None:
    restart = found["restart"]
    table = Table("figure", "seconds", "wanted", box=None, header_style="bold")
    table.add_row(
        "start of the cluster, median", f"{statistics.median(found['cluster_start_seconds']):.2f}", "2"
    )
    table.add_row(
        f"status with {JOBS} jobs, median", f"{statistics.median(found['status_seconds']):.2f}", "1"
    )
    for name, starts in found["first_step"].items():
        totals, commands = ([start[key] for start in starts] for key in ("total", "command"))
        table.add_row(
            f"launch to first step {name} preflight, median", f"{statistics.median(totals):.1f}", ""
        )
        table.add_row("  of that, the command", f"{statistics.median(commands):.1f}", "")
    table.add_row("kill -9 to training again", f"{restart['total']:.1f}", "25")
    table.add_row("  until the verdict", f"{restart['noticed']:.1f}", "")
    table.add_row("  in Slurm's hands", f"{restart['slurm']:.1f}", "")
    table.add_row("  until the first step", f"{restart['started']:.1f}", "")
    Console(highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    missing = missing_programs()
    if missing:
        sys.exit(f"a real Slurm needs {', '.join(missing)}")
    found = measure()
    show(found)
    save(found, given.out)


if __name__ == "__main__":
    main()
