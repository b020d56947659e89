"""How far a run is, and where its time went: from its own files alone, whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.attempts import Launch
from pretrain.records import counted, ledger_records, metric_records
from pretrain.yaml_text import read_yaml

TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Progress:
    steps: int
    step: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    saved_step: int = 0
    save_every: int | None = None

    @property
    def seconds_left(self) -> float | None:
        return None if self.step_seconds is None else (self.steps - self.step) * self.step_seconds

    @property
    def seconds_to_save(self) -> float | None:
        """Until the next checkpoint by the step count."""
        if self.step_seconds is None or self.save_every is None:
            return None
        return (self.save_every - self.step % self.save_every) * self.step_seconds


def read_progress(run: Path) -> Progress:
    """From the config and the newest log lines."""
    config = run / "config.yaml" if (run / "config.yaml").is_file() else run / "launch" / "config.yaml"
    values = read_yaml(config) if config.is_file() else {}
    found: dict[str, Any] = {}
    for record in metric_records(_last_lines(run / "logs" / "metrics.jsonl")):
        found |= record
    section = {
        name: part if isinstance(part := values.get(name), dict) else {} for name in ("run", "checkpoint")
    }
    return Progress(
        steps=section["run"].get("steps", 0),
        step=found.get("step", 0),
        loss=found.get("loss/train"),
        validation_loss=found.get("loss/validation"),
        tokens_per_second=found.get("speed/tokens_per_second"),
        step_seconds=found.get("speed/step_seconds"),
        saved_step=newest_step(run),
        save_every=section["checkpoint"].get("save_every_steps"),
    )


def newest_step(run: Path) -> int:
    """Of the whole checkpoints; 0 without any. By the manifest's presence alone: no file is read.

    A step that is still being written has a longer name, also when its manifest is there.
    """
    found = (path.parent.name.removeprefix("step_") for path in run.glob("checkpoints/step_*/MANIFEST.json"))
    return max((int(name) for name in found if name.isdigit()), default=0)


def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _last_lines(path: Path) -> list[bytes]:
    """The log's last ones, without reading all of it."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(start)
        return file.read().split(b"\n")[1 if start else 0 :]


def last_sign_of_life(run: Path, attempt: int) -> float | None:
    """When an attempt that nobody saw end last wrote something, seconds since 1970. None if it wrote nothing."""
    folder = Launch(run).attempt(attempt).path
    written = [*folder.glob("heartbeats/*.json"), *run.glob(f"logs/rank-*.attempt-{attempt:04d}.log")]
    return max((path.stat().st_mtime for path in [folder, *written] if path.exists()), default=None)


# ------------------------------------------------------------------------------------------------ goodput


@dataclass(frozen=True)
class Goodput:
    """Seconds since the first attempt began, by what they went to."""

    productive: float = 0.0
    start_up: float = 0.0
    """From an attempt's begin to its first step: preflight, imports, loading."""
    waiting: float = 0.0
    """Between attempts: in the queue."""
    checkpoint: float = 0.0
    """Blocked by saves."""
    data_wait: float = 0.0
    evaluation: float = 0.0
    lost: float = 0.0
    """Trained, but not saved before the attempt ended."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def share(self) -> float:
        """Productive part of all; 0 if nothing has passed."""
        return self.productive / self.total if self.total else 0.0


@dataclass(frozen=True)
class Logs:
    """What a run has logged, oldest first: its ledger, each line with `at`, seconds since 1970; and its scalars."""

    ledger: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    damaged_lines: int
    """What they said is not in the other two."""


def read_logs(run: Path) -> Logs:
    ledger, unread = counted(_text(run / "ledger.jsonl"), ledger_records)
    metrics, more = counted(_text(run / "logs" / "metrics.jsonl"), metric_records)
    return Logs(ledger, metrics, unread + more)


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """The ledger alone, for whom its record is enough."""
    return counted(_text(run / "ledger.jsonl"), ledger_records)[0]


def goodput(ledger: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], now: float) -> Goodput:
    """Where the time of a launched run went, by its ledger and its logged scalars.

    The ledger gives each attempt's begin, first step and end; the scalars what was spent on saves, data and
    evaluation, and how long a step takes, from which follows what was lost.
    """
    begun = [event for event in ledger if event["event"] == "attempt"]
    if not begun:
        return Goodput()
    start_up = waiting = lost = training = 0.0
    step_s = _mean([record["speed/step_seconds"] for record in metrics if "speed/step_seconds" in record])
    previous_end: float | None = None
    for index, attempt in enumerate(begun):
        limit = begun[index + 1]["at"] if index + 1 < len(begun) else now
        # By number: times are whole seconds, and an end may be written in the second of the next begin.
        inside = [event for event in ledger if event.get("attempt") == attempt["attempt"]]
        started = next((event["at"] for event in inside if event["event"] == "start"), None)
        ended = next((event for event in inside if event["event"] == "attempt_end"), None)
        end = (ended.get("ended") or ended["at"]) if ended else limit
        end = max(end, started or attempt["at"])
        if previous_end is not None:
            waiting += max(0.0, attempt["at"] - previous_end)
        start_up += (started or end) - attempt["at"]
        training += end - (started or end)
        if ended:
            lost += step_s * max(0, ended.get("last_step", ended["step"]) - ended["step"])
        previous_end = end
    saves = sum(record.get("checkpoint/blocked_seconds", 0.0) for record in metrics)
    evaluation = sum(record.get("speed/evaluation_seconds", 0.0) for record in metrics)
    data_wait = _data_wait(metrics)
    productive = max(0.0, training - lost - saves - evaluation - data_wait)
    return Goodput(productive, start_up, waiting, saves, data_wait, evaluation, lost)


def _data_wait(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Each record's share is of the steps since the record before."""
    total, previous = 0.0, 0
    for record in metrics:
        if "speed/data_wait_share" in record and "speed/step_seconds" in record:
            steps = max(0, record["step"] - previous)
            total += record["speed/data_wait_share"] * record["speed/step_seconds"] * steps
            previous = record["step"]
    return total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
