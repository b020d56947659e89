"""A tiny run for the end-to-end tests: its corpus, its config, and ways to run and to kill it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.stream.batch import Batch
from pretrain.assembly import open_run
from pretrain.config import load_config
from pretrain.engine.base import StepReport
from pretrain.hooks.base import Hook
from pretrain.loop import train
from pretrain.run import Run
from tests.harness import import_deepspeed

TINY = """
run: {{name: tiny, folder: {folder}, steps: 12, device: cpu}}
model: {{family: sigmoid, layers: 2, width: 32, heads: 4, kv_heads: 2, mlp_width: 64, positions: alibi}}
data: {{path: {data}, sequence_length: 32, global_batch_rows: 8}}
optim: {{lr: 5e-3, warmup_steps: 3, weight_decay: 1e-3, clip_norm: 0.5}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: 3, keep_last: 3}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 4, tensorboard: false}}
"""


IMPORTED_LATE = (
    "launch.cli",
    "launch.commands",
    "pretrain.commands.choices",
    "pretrain.commands.data_tables",
    "pretrain.commands.generate",
    "pretrain.commands.inference",
    "pretrain.commands.plan",
    "pretrain.commands.train",
    "pretrain.evaluation",
    "rich._emoji_codes",
    "rich.progress",
    "rich.table",
    "typer.rich_utils",
)


def write_config(folder: Path, data: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder / "runs", data=data))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pretrain.cli", "train", str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread, and none of the variables by which a launcher would speak to the child."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))
    }
    return {**inherited, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step, as logged. Every step is there once."""
    found = [(record["step"], record["loss/train"]) for record in metrics(folder) if "loss/train" in record]
    assert len(found) == len(dict(found)), "a step stands twice in the log"
    return dict(found)


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    errors: str


def run_forked(*arguments: str, before: Callable[[], object] | None = None, timeout_s: float = 120) -> Ended:
    """`triptych ARGUMENTS` in a fork of this process, which has imported DeepSpeed already.

    before: called in the child first, for instance to lower its limits.
    """
    import_commands()
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / "out", Path(folder) / "err"]
        child = get_context("fork").Process(target=_be_triptych, args=(arguments, before, *texts))
        child.start()
        child.join(timeout_s)
        if child.is_alive():
            child.kill()
            child.join()
            raise AssertionError(f"triptych {' '.join(arguments)} did not end within {timeout_s} s")
        assert child.exitcode is not None
        return Ended(child.exitcode, *(text.read_text() for text in texts))


def import_commands() -> None:
    """What the commands import when they are called, once here instead of in each child."""
    import_deepspeed()
    for name in IMPORTED_LATE:
        importlib.import_module(name)


def _be_triptych(
    arguments: tuple[str, ...], before: Callable[[], object] | None, out: Path, err: Path
) -> None:
    from launch.cli import main

    torch.set_num_threads(1)
    os.environ.update(environment())
    sys.argv = ["triptych", *arguments]
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        if before is not None:
            before()
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def kill_at(config: Path, step: int, log: Path, *overrides: str, timeout_s: float = 120) -> None:
    """Start the run and SIGKILL it as soon as `step` is in its log."""
    import_commands()
    nowhere = Path(os.devnull)
    arguments = ("train", str(config), *overrides)
    process = get_context("fork").Process(target=_be_triptych, args=(arguments, None, nowhere, nowhere))
    process.start()
    try:
        _wait_for_step(lambda: process.exitcode, step, log, timeout_s)
    finally:
        process.kill()
        process.join(30)


def wait_for_step(process: subprocess.Popen[Any], step: int, log: Path, timeout_s: float = 120) -> None:
    _wait_for_step(process.poll, step, log, timeout_s)


def _wait_for_step(exit_code: Callable[[], int | None], step: int, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        assert exit_code() is None, f"the run ended by itself with {exit_code()}"
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come within {timeout_s} s")


class StopAt(Hook):
    """Ask the run to stop, as a signal would, at the boundary after `step`."""

    name = "stop_at"

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, run: Run, report: StepReport) -> None:
        if run.clock.step >= self._step:
            run.stop.signal = signal.SIGTERM


class WatchedStream:
    """Notes which rows pass."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.rows: list[list[int]] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            self.rows.append(batch.rows.tolist())
            yield batch

    def take_wait_seconds(self) -> float:
        return float(self._stream.take_wait_seconds())


@dataclass(frozen=True)
class Trained:
    """What one rank saw."""

    first_step: int
    last_step: int
    rows: list[list[int]]
    gradient_norms: list[float]
    done: bool


def train_rank(config_path: Path, overrides: list[str], stop_at: int | None = None) -> Trained:
    """Train in this process, for use as a rank of `run_ranks`."""
    norms = []

    class Norms(Hook):
        name = "norms"

        def after_step(self, run: Run, report: StepReport) -> None:
            norms.append(float(report.gradient_norm))

    with open_run(load_config(config_path, overrides), quiet=True) as run:
        assert dist.get_world_size() == run.ranks.world
        watched = WatchedStream(run.stream)
        run.stream = watched  # type: ignore[assignment]
        run.hooks.add(Norms())
        if stop_at is not None:
            run.hooks.add(StopAt(stop_at))
        first = run.clock.step
        train(run)
        return Trained(first, run.clock.step, watched.rows, norms, run.clock.done)
