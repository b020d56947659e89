"""What a drill does: launch a real training run by the real command, hurt it, and see how it ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import LaunchedRun
from tests.slurm.cluster import Cluster, Process, processes, until

Losses = Mapping[int, float]

STEPS = 60
CONFIG = """
run: {{name: drill, folder: {folder}/runs, steps: {steps}, device: cpu}}
model: {{family: sigmoid, layers: 2, width: 64, heads: 4, mlp_width: 128}}
data: {{path: {data}, sequence_length: 64, global_batch_rows: 32}}
optim: {{lr: 5e-3, warmup_steps: 3}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: 5, keep_last: 3}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 2, tensorboard: false}}
"""
SETTINGS = """
partition: train
time: "20"
gpus_per_node: 0
tasks_per_node: 2
exclusive: false
wait_seconds: 10
signal_seconds: {signal_seconds}
setup: ["export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME={interface}"]
preflight: {{enabled: false, seconds: {preflight_seconds}, dry_step: {dry_step}}}
"""


@dataclass
class Drill:
    cluster: Cluster
    corpus: Path
    folder: Path
    dry_step: bool = False
    """Whether a preflight tries a step."""

    # ------------------------------------------------------------------------------------------------- acting

    def launch(
        self, *options: str, steps: int = STEPS, signal_seconds: int = 120, preflight_seconds: int = 100
    ) -> LaunchedRun:
        """`triptych launch` as a user types it. Raises RuntimeError if it refuses."""
        done = self.launch_command(
            *options, steps=steps, signal_seconds=signal_seconds, preflight_seconds=preflight_seconds
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return LaunchedRun(self.folder / "runs" / "drill")

    def launch_command(
        self, *options: str, steps: int = STEPS, signal_seconds: int = 120, preflight_seconds: int = 100
    ) -> subprocess.CompletedProcess[str]:
        """What the command answers; `options` come last, and win."""
        config, settings = self.folder / "drill.yaml", self.folder / "cluster.yaml"
        text = CONFIG.format(folder=self.folder, data=self.corpus, steps=steps)
        config.write_text(text, encoding="utf-8")
        interface = "eth0" if self.cluster.network else "lo"
        values = SETTINGS.format(
            interface=interface,
            signal_seconds=signal_seconds,
            preflight_seconds=preflight_seconds,
            dry_step=self.dry_step,
        )
        settings.write_text(values, encoding="utf-8")
        return self.command(
            "launch", str(config), "--cluster", str(settings), "--nodes", "2", *options, timeout_s=240
        )

    def command(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """`triptych ...`, talking to this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**self.cluster.environment, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def rank(self, run: LaunchedRun, number: int, job: str | None = None) -> Process:
        """The process of a rank that is training; `job` of a chain, if not the last."""
        wanted = {"SLURM_PROCID": str(number), "SLURM_JOB_ID": job or self.job(run)}
        for process in processes():
            mine = (
                wanted.items() <= process.environment.items()
                and "SLURM_STEP_NUM_TASKS" in process.environment
            )
            if mine and process.name.startswith("python"):
                return process
        raise LookupError(f"rank {number} of {run.run} is not running")

    def end(self) -> None:
        """End what a failed drill may have left."""
        self.cluster.call("scancel", "--me")
        until(lambda: not self.cluster.call("squeue", "-h"), 20)
        for name in self.cluster.names:
            self.cluster.start_node(name)
            self.cluster.call("scontrol", "update", f"nodename={name}", "state=resume")
        self.cluster.wait_idle(timeout_s=30)

    # ------------------------------------------------------------------------------------------------- seeing

    def job(self, run: LaunchedRun) -> str:
        return str(run.job()["jobs"][-1])

    def metrics(self, run: LaunchedRun) -> list[dict[str, Any]]:
        path = run.run / "logs" / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self, run: LaunchedRun) -> Losses:
        """By step, as logged. Every step is there once."""
        found = [
            (record["step"], record["loss/train"]) for record in self.metrics(run) if "loss/train" in record
        ]
        assert len(found) == len(dict(found)), "a step stands twice in the record"
        return dict(found)

    def step(self, run: LaunchedRun) -> int:
        return max((record["step"] for record in self.metrics(run)), default=0)

    def ledger(self, run: LaunchedRun, *events: str) -> list[dict[str, Any]]:
        """The ledger's lines of these kinds."""
        path = run.run / "ledger.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [line for line in map(json.loads, lines) if line["event"] in events or not events]

    def endings(self, run: LaunchedRun) -> list[str]:
        return [line["ending"] for line in self.ledger(run, "attempt_end")]

    def nodes(self, run: LaunchedRun) -> list[list[str]]:
        """Of each attempt."""
        return [line["nodes"] for line in self.ledger(run, "attempt")]

    def wait_step(self, run: LaunchedRun, step: int, timeout_s: float = 90) -> None:
        self.wait(lambda: self.step(run) >= step, timeout_s, f"step {step}", run)

    def wait_saved(self, run: LaunchedRun, step: int, timeout_s: float = 90) -> None:
        """Until a step at least so late is whole: the first save of a start comes late, as it imports its library."""
        self.wait(lambda: run.newest_step() >= step, timeout_s, f"a save of step {step}", run)

    def wait_attempt(self, run: LaunchedRun, number: int, timeout_s: float = 90) -> None:
        """Until that attempt trains."""
        self.wait(lambda: len(self.ledger(run, "start")) >= number, timeout_s, f"attempt {number}", run)

    def wait_rank(self, run: LaunchedRun, number: int, timeout_s: float = 60) -> Process:
        """The process of a rank, as soon as there is one."""
        found: list[Process] = []

        def look() -> bool:
            with contextlib.suppress(LookupError):
                found.append(self.rank(run, number))
            return bool(found)

        self.wait(look, timeout_s, f"rank {number}", run)
        return found[0]

    def wait_finished(self, run: LaunchedRun, timeout_s: float = 150) -> None:
        self.wait(run.outcome_file.is_file, timeout_s, "the end", run)
        outcome = json.loads(run.outcome_file.read_text())
        assert outcome["ending"] == "done", self.report(run)

    def wait(self, condition: Callable[[], object], timeout_s: float, what: str, run: LaunchedRun) -> None:
        if not until(condition, timeout_s):
            raise TimeoutError(f"{what} did not come in {timeout_s} s\n{self.report(run)}")

    def report(self, run: LaunchedRun) -> str:
        """All there is to see, for a drill that failed."""
        parts = [self.cluster.call("squeue", "-t", "all"), self.cluster.call("sinfo", "-N")]
        for path in [run.run / "ledger.jsonl", *run.run.glob("launch/submitit/*_0_log.out")]:
            if path.is_file():
                parts.append(f"{path}:\n{path.read_text(encoding='utf-8')[-3000:]}")
        for path in sorted(run.run.glob("logs/rank-*.log")):
            parts.append(f"{path}:\n{path.read_text(encoding='utf-8', errors='replace')[-800:]}")
        return "\n".join(parts)

    def check(self, run: LaunchedRun, undisturbed: Losses, *endings: str) -> None:
        """What every drill ends with: the losses of a run that nothing happened to, bit for bit; each step once in
        the record; the ledger's account; no process left."""
        self.wait_finished(run)
        assert self.losses(run) == undisturbed
        assert self.endings(run) == [*endings, "done"], self.report(run)
        assert until(lambda: not self.has_ranks(run), 10), "ranks are left"

    def has_ranks(self, run: LaunchedRun) -> bool:
        """Whether a process of the run's newest job is there that srun started."""
        job = self.job(run)
        environments = (process.environment for process in processes())
        return any(
            found.get("SLURM_JOB_ID") == job and "SLURM_STEP_NUM_TASKS" in found for found in environments
        )
