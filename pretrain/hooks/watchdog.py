"""Ends a run of several processes in which a rank has fallen silent, and says which.

Every rank keeps a heartbeat file: its step, when it took it, and when its process last ran at all. When a rank has
not taken a step for the limit, its watchdog writes its own stacks and looks at the others: a rank whose process no
longer runs is the culprit, else the one that is furthest behind. Then it ends its process with the code of a node
fault. A launcher then starts again without that node; torchrun ends the other ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch.distributed as dist

from pretrain.attempts import AttemptFolder, Launch, RankExit, own_attempt, read_json, write_json
from pretrain.exit_codes import EXIT_NODE_FAULT
from pretrain.hooks.base import Hook, Setup

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run
    from pretrain.run_folder import RunFolder

OTHERS_MAY_DUMP_S = 3.0
"""Between the first dump and the end of a process: the other ranks' watchdogs write theirs meanwhile."""


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    host: str
    step: int
    stepped_at: float
    """When the last step ended, seconds since 1970."""
    alive_at: float
    """When the process last ran."""


class WatchdogHook(Hook):
    """limit_s: seconds without a step after which a rank counts as hung. Evaluation and checkpoints count as work:
    it must be longer than the longest of them."""

    name = "watchdog"

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        limit_s, attempt = setup.config.monitor.watchdog_seconds, own_attempt()
        # A process by itself waits for no other.
        if limit_s is None or (attempt is None and dist.get_world_size() == 1):
            return None
        return cls(limit_s, watchdog_folder(setup.folder))

    def __init__(self, limit_s: float, folder: AttemptFolder) -> None:
        self._limit_s = limit_s
        self._folder = folder
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def before_training(self, run: Run) -> None:
        self._rank, self._step = run.ranks.rank, run.clock.step
        self._stepped = time.monotonic()
        self._folder.heartbeats.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            self._beat(0.0)  # at once: a rank without a heartbeat is never the one that is blamed
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def after_step(self, run: Run, report: StepReport) -> None:
        self._step, self._stepped = run.clock.step, time.monotonic()

    def waiting(self, run: Run) -> None:
        self._stepped = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        period_s = min(max(self._limit_s / 20, 0.2), 10.0)
        while not self._ended.wait(period_s):
            silent_s = time.monotonic() - self._stepped
            try:
                self._beat(silent_s)
            except OSError as error:  # a full disk, a storage that is away: the next one may pass
                print(f"warning: no heartbeat was written: {error}", file=sys.stderr, flush=True)
            if silent_s > self._limit_s:
                try:
                    self._give_up(period_s)
                except Exception:  # e.g. no room for the stacks: the rank hangs all the same
                    traceback.print_exc()
                finally:
                    os._exit(EXIT_NODE_FAULT)  # the main thread hangs in a collective and would never return

    def _beat(self, silent_s: float) -> None:
        now = time.time()
        beat = Heartbeat(self._rank, platform.node(), self._step, now - silent_s, now)
        write_json(self._folder.heartbeats / f"{self._rank:05d}.json", asdict(beat))

    def _give_up(self, period_s: float) -> None:
        self._dump_stacks()
        time.sleep(OTHERS_MAY_DUMP_S)
        culprit = first_silent(read_heartbeats(self._folder), stale_s=5 * period_s + OTHERS_MAY_DUMP_S)
        reason = (
            f"no step for {self._limit_s:.0f} s; the first silent rank is {culprit.rank} on {culprit.host}, "
            f"at step {culprit.step}; stacks are in {self._folder.stacks}"
        )
        if not self._folder.fault.exists():
            write_json(self._folder.fault, {"rank": culprit.rank, "host": culprit.host, "reason": reason})
        self._folder.record_exit(RankExit(self._rank, platform.node(), EXIT_NODE_FAULT, reason, self._step))
        print(f"error: {reason}", file=sys.stderr, flush=True)

    def _dump_stacks(self) -> None:
        self._folder.stacks.mkdir(parents=True, exist_ok=True)
        path = self._folder.stacks / f"rank-{self._rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            print(
                f"rank {self._rank} on {platform.node()}, process {os.getpid()}, step {self._step}", file=file
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        recorded = recorded_collectives()
        if recorded is not None:
            path.with_suffix(".collectives.json").write_bytes(recorded)


def recorded_collectives() -> bytes | None:
    """What torch's flight recorder holds, as JSON: the last collectives of this process, which of them have ended,
    and which it waits in. None where this torch has no recorder.

    It records if TORCH_FR_BUFFER_SIZE (older: TORCH_NCCL_TRACE_BUFFER_SIZE) says how many to keep; the
    launcher sets both.
    """
    from torch._C import _distributed_c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        if dump is not None:
            found: bytes = dump()
            return found
    return None


def watchdog_folder(folder: RunFolder) -> AttemptFolder:
    """Where the ranks' signs of life are: the attempt's, or of a run that no launcher started one for all starts."""
    attempt = own_attempt()
    return AttemptFolder(folder.watchdog) if attempt is None else Launch(folder.path).attempt(attempt)


def read_heartbeats(folder: AttemptFolder) -> list[Heartbeat]:
    """By rank."""
    return [Heartbeat(**read_json(path)) for path in sorted(Path(folder.heartbeats).glob("*.json"))]


def first_silent(beats: list[Heartbeat], stale_s: float) -> Heartbeat:
    """The rank whose process stopped first, if one has been still for `stale_s`; else the one furthest behind."""
    newest = max(beat.alive_at for beat in beats)
    still = [beat for beat in beats if newest - beat.alive_at > stale_s]
    if still:
        return min(still, key=lambda beat: beat.alive_at)
    return min(beats, key=lambda beat: (beat.step, beat.stepped_at))
