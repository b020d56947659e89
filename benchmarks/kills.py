"""Random kills of real runs, and whether their final weights are those of a run that nobody killed, bit for bit.

    python -m benchmarks.kills --kills 200

Each layout trains the same tiny model on a CPU under torchrun: sizes 1 and 2, ZeRO 0 to 3 on DeepSpeed, and the
Megatron engine. SIGKILL comes at a random moment: while the run starts, while it trains, while it saves; to all its
processes at once, as when a node loses power, or to one rank. After each kill every step folder must be whole. The
command is then given again, and so on; what the last start leaves is compared with the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.common import save
from pretrain.checkpoint.steps import list_steps, step_name
from pretrain.checkpoint.weights import load_weights, read_parameter_shapes
from pretrain.errors import CheckpointError
from tests.corpus import build_corpus
from tests.e2e.training import environment, losses

STEPS_PER_KILL, STEPS_AFTER = 8, 6
SAVE_EVERY = 3
LIMIT_S = 300.0
"""A start that has neither come to its kill nor ended by then hangs."""
MOMENTS = ("start", "step", "save")
CONFIG = """
run: {{name: tiny, folder: {folder}/runs, steps: {steps}, device: cpu}}
model: {{family: sigmoid, layers: 2, width: 32, heads: 4, kv_heads: 2, mlp_width: 64, positions: alibi}}
data: {{path: {data}, sequence_length: 32, global_batch_rows: 8}}
optim: {{lr: 5e-3, warmup_steps: 3, weight_decay: 1e-3, clip_norm: 0.5}}
checkpoint: {{save_every_steps: {every}, keep_last: 2}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 2, tensorboard: false}}
"""


@dataclass(frozen=True)
class Layout:
    ranks: int
    overrides: tuple[str, ...]


LAYOUTS: Mapping[str, Layout] = {
    **{
        f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {zero}": Layout(ranks, (f"parallel.zero={zero}",))
        for ranks in (1, 2)
        for zero in range(4)
    },
    **{
        f"{ranks} rank{'s' * (ranks > 1)}, Megatron, ZeRO {zero}": Layout(
            ranks, ("parallel.engine=megatron", f"parallel.zero={zero}")
        )
        for ranks, zero in ((1, 0), (2, 1))
    },
    "2 ranks, Megatron, pipeline": Layout(
        2, ("parallel.pipeline=2", "parallel.zero=0", "data.micro_batch_rows=4")
    ),
}


@dataclass
class Outcome:
    """Of one layout. problem: "" if all is well."""

    layout: str
    kills: int = 0
    by_moment: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    starts: int = 0
    seconds: float = 0.0
    bit_equal: bool = False
    problem: str = ""


class Failed(Exception):
    """What a drill found wrong."""


class Runs:
    """One layout's runs in a folder of their own."""

    def __init__(self, folder: Path, data: Path, layout: Layout, steps: int) -> None:
        self.folder, self.layout, self.steps = folder, layout, steps
        folder.mkdir()
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG.format(folder=folder, data=data, steps=steps, every=SAVE_EVERY))
        self.run = folder / "runs" / "tiny"

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """torchrun as the leader of a session of its own, which is gone afterwards."""
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.layout.ranks}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "pretrain.cli", "train"]
        with (self.folder / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [*launcher, str(self.config), "--quiet", *self.layout.overrides],
                env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            self.kill(process)
            process.wait(timeout=30)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """All that this start has, as a power failure does."""
        found = ranks_of(process.pid)
        for pid in found:
            # torchrun's ranks are sessions of their own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Train to the end. Raises Failed with what the run said."""
        with self.started() as process:
            try:
                code = process.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"a start did not end in {LIMIT_S:.0f} s; {self.said()}") from None
        if code:
            raise Failed(f"a start ended with {code}; {self.said()}")

    def said(self) -> str:
        return (self.folder / "output.log").read_text(errors="replace")[-1500:]

    def step(self) -> int:
        """The newest in the log."""
        log = self.run / "logs" / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            last = log.read_bytes().rsplit(b"\n", 2)[-2:-1]
            if last and b'"step": ' in last[0]:
                return int(last[0].split(b'"step": ')[1].split(b",")[0])
        return 0

    def saves(self) -> bool:
        """Whether a save is going on."""
        return any((self.run / "checkpoints").glob("*.partial"))

    def weights(self) -> dict[str, torch.Tensor]:
        path = self.run / "checkpoints" / step_name(self.steps)
        found = {name: torch.empty(shape) for name, shape in read_parameter_shapes(path).items()}
        load_weights(path, found)
        return found


def check_steps(checkpoints: Path) -> None:
    """What has a step's name is whole, whatever the moment of the kill was. Raises Failed."""
    for found in list_steps(checkpoints, checksums=True):
        if found.problem is not None:
            raise Failed(f"step {found.step} after a kill: {found.problem}")


def ranks_of(launcher: int) -> list[int]:
    """Processes that a torchrun has started, by their parents."""
    found, parents = [], {launcher}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda one: int(one.name)):
        with contextlib.suppress(OSError, IndexError):
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) in parents:
                parents.add(int(path.name))
                found.append(int(path.name))
    return found


def kill_once(runs: Runs, draw: random.Random, moment: str, until_step: int) -> bool:
    """Start, and kill at a random moment of this kind; False if the run ended by itself before."""
    began, start_s = time.monotonic(), draw.uniform(0.2, 8.0)
    wanted = until_step - draw.randrange(STEPS_PER_KILL // 2)
    delay_s = draw.uniform(0.0, 0.03)
    reached: Callable[[], bool] = {
        "start": lambda: time.monotonic() - began > start_s or runs.step() >= until_step,
        "step": lambda: runs.step() >= wanted,
        "save": lambda: runs.step() >= wanted - SAVE_EVERY and runs.saves(),
    }[moment]
    with runs.started() as process:
        while not reached():
            if process.poll() is not None:
                if process.returncode:
                    raise Failed(f"a start ended with {process.returncode}; {runs.said()}")
                return False
            if time.monotonic() - began > LIMIT_S:
                raise Failed(f"a start did not come to its {moment} in {LIMIT_S:.0f} s; {runs.said()}")
            time.sleep(0.001)
        time.sleep(delay_s / (10 if moment == "save" else 1))
        ranks = [pid for pid in ranks_of(process.pid) if is_rank(pid)]
        if ranks and draw.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(ranks), signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            if process.poll() is None:
                raise Failed("a rank was killed, and torchrun did not end in 60 s")
            if process.returncode == 0:
                return False  # it had ended before
        else:
            runs.kill(process)
            process.wait(timeout=30)
    return True


def is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def drill(
    name: str, layout: Layout, kills: int, seed: int, folder: Path, data: Path, watch: Callable[[], object]
) -> Outcome:
    """Reference, kills, comparison."""
    outcome, began = Outcome(name), time.monotonic()
    draw = random.Random(f"{seed}/{name}")
    steps = kills * STEPS_PER_KILL + STEPS_AFTER
    try:
        folder.mkdir(parents=True)
        whole, hurt = (Runs(folder / kind, data, layout, steps) for kind in ("whole", "hurt"))
        whole.finish()
        while outcome.kills < kills:
            moment = draw.choices(MOMENTS, weights=(3, 3, 4))[0]
            outcome.starts += 1
            if not kill_once(hurt, draw, moment, (outcome.kills + 1) * STEPS_PER_KILL):
                break
            outcome.kills += 1
            outcome.by_moment[moment] += 1
            check_steps(hurt.run / "checkpoints")
            watch()
        hurt.finish()
        one, other = whole.weights(), hurt.weights()
        outcome.bit_equal = one.keys() == other.keys() and all(
            torch.equal(one[key].view(torch.int32), other[key].view(torch.int32)) for key in one
        )
        if not outcome.bit_equal:
            outcome.problem = "the final weights differ"
        elif losses(whole.run) != losses(hurt.run):
            outcome.problem = "the logged losses differ"
        elif outcome.kills < kills:
            outcome.problem = f"the run was over after {outcome.kills} of {kills} kills"
    except (Failed, CheckpointError, AssertionError, OSError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def drill_all(
    names: Sequence[str], kills: int, *, seed: int, lanes: int, folder: Path, show: bool = True
) -> list[Outcome]:
    """The kills dealt out to the layouts, `lanes` layouts at a time."""
    data = build_corpus(folder, documents=30)
    shares = {name: kills // len(names) + (number < kills % len(names)) for number, name in enumerate(names)}
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns, disable=not show) as bar, ThreadPoolExecutor(lanes) as pool:
        task = bar.add_task("kills", total=kills)

        def watch() -> None:
            with lock:
                bar.advance(task)

        jobs = [
            pool.submit(drill, name, LAYOUTS[name], share, seed, folder / f"layout-{number}", data, watch)
            for number, (name, share) in enumerate(shares.items())
            if share
        ]
        return [job.result() for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="over all layouts (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lanes", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="layouts at a time"
    )
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], metavar="LAYOUT")
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    default_out = Path("benchmarks/results/kills.json")
    parser.add_argument("--out", type=Path, default=default_out)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = drill_all(
            options.layouts, options.kills, seed=options.seed, lanes=options.lanes, folder=folder
        )
    results: dict[str, Any] = {
        "kills": sum(one.kills for one in outcomes),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
        "all_bit_equal": all(one.bit_equal and not one.problem for one in outcomes),
        "layouts": [asdict(one) for one in outcomes],
    }
    for one in outcomes:
        told = one.problem or "bit-equal"
        print(f"{one.layout:32s} {one.kills:4d} kills {one.by_moment} {one.seconds:7.1f} s  {told}")
    save(results, options.out)
    sys.exit(0 if results["all_bit_equal"] else 1)


if __name__ == "__main__":
    main()
