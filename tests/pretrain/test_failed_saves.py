"""A save that fails beside the loop: known to all ranks soon, tried again where there may be room, else the end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain.assembly import open_run
from pretrain.config import load_config
from pretrain.engine.base import StepReport
from pretrain.errors import CheckpointError, NoRoomError
from pretrain.hooks import checkpoints
from pretrain.hooks.base import Hook
from pretrain.loop import train
from pretrain.run import Run
from tests.corpus import build_corpus
from tests.e2e.training import losses, train_rank, write_config
from tests.harness import run_ranks

DISK_BYTES = 4 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which only root may")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, train_rank, write_config(folder, data), [])
    return losses(folder / "runs" / "tiny")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's checkpoint folder, a disk of its own."""
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "triptych-test", str(folder)]
    subprocess.run(mount, check=True, timeout=10)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


class At(Hook):
    """Does something once, after a step, on rank 0."""

    name = "at"

    def __init__(self, **what: Any) -> None:
        self._what = {int(step.removeprefix("step_")): act for step, act in what.items()}

    def after_step(self, run: Run, report: StepReport) -> None:
        if run.ranks.is_main and run.clock.step in self._what:
            self._what[run.clock.step]()


@dataclass(frozen=True)
class Ended:
    error: str | None
    may_pass: bool
    step: int


def train_hurt(config: Path, overrides: list[str], hurt: Hook) -> Ended:
    with open_run(load_config(config, overrides), quiet=True) as run:
        run.hooks._hooks.insert(0, hurt)
        try:
            train(run)
        except CheckpointError as error:
            return Ended(str(error), isinstance(error, NoRoomError), run.clock.step)
        return Ended(None, False, run.clock.step)


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(1 << 12))
    os.close(descriptor)


def ledger(run: Path, *events: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] in events]


@as_root
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_tried_again_until_there_is_room(
    ranks: int,
    asynchronous: str,
    tmp_path: Path,
    data: Path,
    small_disk: Path,
    whole: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_EVERY_S", 0.0)
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    hurt = At(step_2=lambda: fill(small_disk), step_8=lambda: (small_disk / "filler").unlink())
    overrides = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.save_every_steps=3"]
    for ended in run_ranks(ranks, train_hurt, config, overrides, hurt):
        assert ended == Ended(None, False, 12)
    failed = ledger(run, "save_failed")
    assert failed[0]["step"] == 3 and "No space left on device" in failed[0]["reason"]
    assert all(line["again"] for line in failed)
    # One that was begun before there was room may have been written after.
    assert 3 < ledger(run, "save")[0]["step"] <= 12 and ledger(run, "save")[-1]["step"] == 12
    assert losses(run) == pytest.approx(whole, abs=1e-5)
    assert run_ranks(ranks, train_rank, config, overrides)[0].first_step == 12


@as_root
def test_the_last_save_waits_for_room_and_gives_up_in_the_end(
    tmp_path: Path, data: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_EVERY_S", 0.05)
    monkeypatch.setattr(checkpoints, "RETRY_FOR_S", 0.5)
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    overrides = ["checkpoint.save_every_steps=null"]
    ended = run_ranks(1, train_hurt, config, overrides, At(step_2=lambda: fill(small_disk)))[0]
    assert ended.error is not None and ended.may_pass, "another attempt may find room"
    assert "could not be saved" in ended.error and "bytes are free there" in ended.error
    tried = ledger(run, "save_failed")
    assert len(tried) >= 3 and [line["again"] for line in tried] == [*[True] * (len(tried) - 1), False]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_will_not_pass_stops_the_run_at_once(ranks: int, tmp_path: Path, data: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"

    def no_folder() -> None:
        (run / "checkpoints").rmdir()
        (run / "checkpoints").write_text("a file where the folder was")

    overrides = ["checkpoint.save_every_steps=100", "run.steps=1000", "optim.schedule=constant"]
    overrides += ["monitor.log_every_steps=1000"]
    for ended in run_ranks(ranks, train_hurt, config, overrides, At(step_99=no_folder)):
        assert ended.error is not None and not ended.may_pass
        # The writer's thread has to come to it; then two boundaries.
        assert 100 < ended.step < 150, "long before the next save"
    assert [line["again"] for line in ledger(run, "save_failed")] == [False]
