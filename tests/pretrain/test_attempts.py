"""Attempts of a launched run: the fence around its checkpoints, its lock, and who is named when a rank falls silent."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from pretrain.attempts import ATTEMPT_VARIABLE, AttemptFolder, Fence, Launch, RankExit, own_attempt
from pretrain.checkpoint import CheckpointStore
from pretrain.errors import CheckpointError, TransientError, UserError
from pretrain.hooks.watchdog import Heartbeat, first_silent
from pretrain.parallel.ranks import meeting_port
from pretrain.run_folder import RunFolder
from tests.pretrain.checkpoint.states import make_state


def store(run: Path, attempt: int | None) -> CheckpointStore:
    fence = Fence(Launch(run), attempt)
    return CheckpointStore(run / "checkpoints", group=None, keep_last=2, asynchronous=False, fence=fence)


def test_an_attempt_that_was_given_up_commits_nothing_and_damages_nothing(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.begin(1)
    old = store(tmp_path, 1)
    old.save(5, make_state())
    launch.begin(2)
    new = store(tmp_path, 2)
    new.save(10, make_state())
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    for step in (10, 15):
        with pytest.raises(CheckpointError, match="attempt 1 on .* was given up, attempt 2"):
            old.save(step, make_state())
    after = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert after == before
    assert new.latest() == tmp_path / "checkpoints" / "step_00000010"


def test_a_save_that_a_newer_attempt_overtakes_is_not_given_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch(tmp_path)
    launch.begin(1)
    old = store(tmp_path, 1)
    write = old._write_files

    def overtaken(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        launch.begin(2)

    monkeypatch.setattr(old, "_write_files", overtaken)
    with pytest.raises(CheckpointError, match="attempt 2"):
        old.save(5, make_state())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_without_a_launcher_there_is_no_fence(tmp_path: Path) -> None:
    Launch(tmp_path).begin(7)
    store(tmp_path, None).save(5, make_state())
    assert own_attempt({}) is None and own_attempt({"TRIPTYCH_ATTEMPT": "3"}) == 3


def test_a_newer_attempt_takes_the_lock_and_nobody_else_does(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    with folder.lock(attempt=1):
        for other in (None, 1):
            with pytest.raises(UserError, match="another run is writing here"):
                folder.lock(attempt=other)
        with folder.lock(attempt=2), pytest.raises(UserError, match="another run"):
            folder.lock(attempt=2)


def test_exits_are_kept_by_rank(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    for rank in (1, 0):
        folder.record_exit(RankExit(rank, "node1", 75, "SIGUSR2", 8))
    assert [found.rank for found in folder.exits()] == [0, 1]


def beat(rank: int, *, step: int = 8, stepped: float = 0.0, alive: float = 0.0) -> Heartbeat:
    now = time.time()
    return Heartbeat(rank, f"node{rank}", step, now - stepped, now - alive)


def test_a_stopped_process_is_the_culprit_before_a_slow_one() -> None:
    beats = [beat(0, step=7, stepped=20), beat(1, stepped=19), beat(2, stepped=19, alive=15)]
    assert first_silent(beats, stale_s=5).rank == 2


def test_else_the_rank_furthest_behind() -> None:
    beats = [beat(0, stepped=19), beat(1, step=7, stepped=18), beat(2, step=8, stepped=25)]
    assert first_silent(beats, stale_s=5).rank == 1


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, TransientError), (errno.EACCES, UserError)])
def test_what_a_storage_may_take_back_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot be made") as caught:
        RunFolder(tmp_path / "run").create()
    assert type(caught.value) is kind


def test_ranks_of_an_attempt_meet_where_no_earlier_one_did() -> None:
    step = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
    ports = {meeting_port({**step, ATTEMPT_VARIABLE: str(number)}) for number in range(1, 11)}
    assert len(ports) == 10 and all(20000 <= port < 32000 for port in ports)
