"""Attempts of a launched run: who may write, and how each attempt ended.

A launcher starts a run again and again, after preemptions, time limits and faults. Each start is an attempt with
a number of its own, greater than all before it, which the ranks find in their environment. What they leave in
`launch/attempts/<number>/` is all that the launcher knows of them: an exit code means little once one rank's end
has made Slurm kill the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError, UserError
from pretrain.json_text import to_json

STAGE_FILE = "stage.json"
ATTEMPT_VARIABLE = "TRIPTYCH_ATTEMPT"
"""Number of the attempt, set by the launcher for every rank."""


@dataclass(frozen=True)
class RankExit:
    """How one rank of an attempt ended, as it says itself. A rank that was killed says nothing."""

    rank: int
    host: str
    code: int
    reason: str
    step: int | None


@dataclass(frozen=True)
class AttemptFolder:
    """What the ranks of one attempt leave behind."""

    path: Path

    def record_exit(self, found: RankExit) -> None:
        write_json(self.path / f"exit.{found.rank:05d}.json", asdict(found))

    def exits(self) -> list[RankExit]:
        """By rank."""
        return [RankExit(**read_json(path)) for path in sorted(self.path.glob("exit.*.json"))]

    def tell(self, stage: str) -> None:
        """What the start-up is doing now, for `triptych status`. A full disk is no reason to end it."""
        with contextlib.suppress(OSError):
            write_json(self.path / STAGE_FILE, {"stage": stage, "since": time.time()})

    def told(self) -> tuple[str, float] | None:
        """The stage that was told last, and since when; None if there is none."""
        try:
            found = read_json(self.path / STAGE_FILE)
            return str(found["stage"]), float(found["since"])
        except (OSError, UserError, KeyError, TypeError, ValueError):
            return None

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeats"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    @property
    def fault(self) -> Path:
        """Which rank was found silent, by the watchdog."""
        return self.path / "fault.json"


@dataclass(frozen=True)
class Launch:
    """The launcher's part of a run folder."""

    run: Path

    @property
    def path(self) -> Path:
        return self.run / "launch"

    def attempt(self, number: int) -> AttemptFolder:
        return AttemptFolder(self.path / "attempts" / f"{number:04d}")

    @property
    def current(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        try:
            return int(read_json(self.path / "attempt.json")["number"])
        except FileNotFoundError:
            return 0

    def record(self, event: str, **facts: Any) -> None:
        """Add a line to the run's ledger."""
        append_ledger(self.run / "ledger.jsonl", event, facts)

    def begin(self, number: int, **facts: Any) -> AttemptFolder:
        """Make attempt `number` the newest. From here on, no older attempt commits a checkpoint."""
        folder = self.attempt(number)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "attempt.json", {"number": number, "since": time.time(), **facts})
        return folder


def own_attempt(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's attempt; None if no launcher started it."""
    value = environment.get(ATTEMPT_VARIABLE)
    return int(value) if value else None


@dataclass(frozen=True)
class Fence:
    """Keeps a rank that outlived its attempt, on a node that was cut off, from touching its successor's files."""

    launch: Launch
    attempt: int | None

    @property
    def name(self) -> str:
        """Of this writer, in file names: two attempts never write under the same one."""
        return "partial" if self.attempt is None else f"attempt-{self.attempt:04d}"

    def check(self) -> None:
        """Raises CheckpointError if a newer attempt has begun."""
        if self.attempt is None:
            return
        newest = self.launch.current
        if newest > self.attempt:
            raise CheckpointError(
                f"{self.launch.run}: attempt {self.attempt} on {platform.node()} was given up, attempt {newest} has "
                "taken its place; nothing was written"
            )


def append_ledger(path: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Add a line: what happened, when."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts}
    with path.open("ab+") as file:
        # A full disk may have cut the last line: this one must not be lost with it.
        torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + to_json(line).encode() + b"\n")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: readers on other nodes never see a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
    temporary.write_text(to_json(value), encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is no JSON; FileNotFoundError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: damaged ({reason}); put it back from a copy, or move it away") from None


def tell_stage(run: Path, stage: str, attempt: int | None) -> None:
    """`AttemptFolder.tell` of a launched run; of others nothing."""
    if attempt is not None:
        Launch(run).attempt(attempt).tell(stage)
