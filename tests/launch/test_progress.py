"""How far a run is and where its time went, from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from launch.job import LaunchedRun
from launch.progress import Goodput, Progress, goodput, read_progress
from launch.status import RunStatus, duration, sorted_by, status_table
from pretrain.errors import UserError


def event(kind: str, at: float, **facts: object) -> dict[str, object]:
    return {"event": kind, "at": at, **facts}


def test_goodput_adds_up_to_the_time_that_passed() -> None:
    ledger = [
        event("attempt", 0.0, attempt=1),
        event("start", 10.0, attempt=1),
        event("attempt_end", 110.0, attempt=1, step=80, last_step=90),
        event("attempt", 130.0, attempt=2),
        event("start", 140.0, attempt=2),
        event("attempt_end", 200.0, attempt=2, step=140, last_step=140),
    ]
    metrics = [
        {"step": 50, "speed/step_seconds": 1.0, "speed/data_wait_share": 0.1},
        {"step": 50, "checkpoint/blocked_seconds": 2.0, "speed/evaluation_seconds": 3.0},
        {"step": 100, "speed/step_seconds": 1.0, "speed/data_wait_share": 0.0},
    ]
    used = goodput(ledger, metrics, now=500.0)
    assert used == Goodput(
        productive=pytest.approx(160 - 10 - 2 - 3 - 5),  # type: ignore[arg-type]
        start_up=20.0,
        waiting=20.0,
        checkpoint=2.0,
        data_wait=pytest.approx(5.0),  # type: ignore[arg-type]
        evaluation=3.0,
        lost=10.0,
    )
    assert used.total == pytest.approx(200.0) and used.share == pytest.approx(0.7)


def test_an_attempt_that_died_with_its_node_counts_to_its_last_sign_of_life() -> None:
    ledger = [
        event("attempt", 0.0, attempt=1),
        event("start", 10.0, attempt=1),
        event(
            "attempt_end", 500.0, attempt=1, step=80, last_step=90, ended=110.0
        ),  # written by the next attempt
        event("attempt", 500.0, attempt=2),
    ]
    used = goodput(ledger, [{"step": 50, "speed/step_seconds": 1.0}], now=500.0)
    assert used == Goodput(productive=90.0, start_up=10.0, waiting=390.0, lost=10.0)


def test_an_attempt_that_is_still_starting_is_all_start_up() -> None:
    used = goodput([event("attempt", 100.0, attempt=1)], [], now=130.0)
    assert used == Goodput(start_up=30.0)
    assert goodput([], [], now=1.0) == Goodput() and Goodput().share == 0.0


def test_progress_from_the_newest_lines(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("run: {steps: 100}\ncheckpoint: {save_every_steps: 30}\n")
    (tmp_path / "checkpoints" / "step_00000030").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000030" / "MANIFEST.json").touch()
    for unfinished in ("step_00000060.partial", "step_00000060.attempt-0002"):
        (tmp_path / "checkpoints" / unfinished).mkdir()
        (tmp_path / "checkpoints" / unfinished / "MANIFEST.json").touch()  # the rename is still to come
    records = [{"step": s, "loss/train": 5 - s / 20, "speed/step_seconds": 2.0} for s in range(1, 51)]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "logs" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 51, "loss']))
    found = read_progress(tmp_path)
    assert (found.step, found.steps, found.saved_step, found.loss) == (50, 100, 30, 2.5)
    assert found.seconds_left == 100.0 and found.seconds_to_save == 20.0


def test_durations() -> None:
    assert [duration(s) for s in (5, 200, 7500, 100_000)] == ["5 s", "3 min 20 s", "2 h 5 min", "1 d 3 h"]


def test_a_sweep_is_sorted_by_its_results() -> None:
    def status(name: str, validation: float | None) -> RunStatus:
        progress = Progress(steps=10, validation_loss=validation)
        return RunStatus(LaunchedRun(Path(name)), [], 1, progress, Goodput(), None)

    some = [status("a", 3.0), status("b", None), status("c", 2.5)]
    assert [one.run.run.name for one in sorted_by("validation", some)] == ["c", "a", "b"]
    assert sorted_by("name", some) == some
    with pytest.raises(UserError, match="--sort speed: one of name, loss, validation"):
        sorted_by("speed", some)


def test_a_sweep_has_a_column_per_swept_key() -> None:
    values = [{"optim.lr": 0.001, "run.seed": 1}, {"optim.lr": 0.003, "run.seed": 1}]
    some = [
        RunStatus(
            LaunchedRun(Path(f"run-{i}")), [], 1, Progress(10, 10, 2.5 - i), Goodput(), "done", None, found
        )
        for i, found in enumerate(values)
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status_table(some))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[0][:3] == ["run", "optim.lr", "run.seed"]
    assert [line[:3] for line in lines[1:]] == [["run-0", "0.001", "1"], ["run-1", "0.003", "1"]]
    assert "2.5000" in lines[1] and "1.5000" in lines[2]
