"""Every scalar has its help text, in the docs too; what cannot be written is told with its file."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
from pathlib import Path

import pytest

from pretrain import monitoring
from pretrain.errors import UserError
from pretrain.monitoring import (
    EVENTS,
    SCALARS,
    JsonLinesSink,
    TensorBoardSink,
    help_text,
    layer_scalar,
)
from pretrain.run_folder import RunFolder


def test_docs_list_every_scalar_with_its_help() -> None:
    rows = re.findall(
        r"^\| `([a-z_/]+/[a-z_]+)` \| (.+) \|$", Path("pretrain/README.md").read_text(), flags=re.M
    )
    assert dict(rows) == dict(SCALARS)


def test_a_layers_series_has_the_help_of_the_whole() -> None:
    name = layer_scalar("newton/residual_max", 3)
    assert name == "newton/residual_max/layer_03"
    assert help_text(name) == SCALARS["newton/residual_max"]
    with pytest.raises(UserError, match="no help text"):
        help_text(layer_scalar("newton/secret", 3))


def test_a_scalar_without_help_is_a_bug(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    with pytest.raises(UserError, match="no help text"):
        sink.write(1, {"loss/secret": 1.0})
    sink.close()


def steps_shown(folder: Path) -> list[int]:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder))
    shown.Reload()
    return [event.step for event in shown.Scalars("loss/train")]


def test_tensorboard_survives_a_clock_that_is_set_back(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss/train": float(step)})
    first.close()
    (file,) = tmp_path.iterdir()
    # As a clock an hour ahead would have named it.
    began, rest = file.name.removeprefix(EVENTS).split(".", 1)
    file.rename(tmp_path / f"{EVENTS}{int(began) + 3600}.{rest}")
    again = TensorBoardSink(tmp_path, 2)
    for step in (3, 4):
        again.write(step, {"loss/train": float(step)})
    again.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[1].startswith(f"{EVENTS}{int(began) + 3601}."), "read after the one before it"
    assert steps_shown(tmp_path) == [1, 2, 3, 4]


def test_tensorboard_is_up_to_date_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    monkeypatch.setattr(monitoring, "FLUSH_S", 0.0)
    sink.write(1, {"loss/train": 1.0})
    assert steps_shown(tmp_path) == [1]
    sink.close()


def test_writes_that_fail_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "FLUSH_S", 0.0)
    board = TensorBoardSink(tmp_path / "board", 0)
    lines = JsonLinesSink(tmp_path / "metrics.jsonl")
    size = max(path.stat().st_size for path in (tmp_path / "board").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UserError, match=rf"{tmp_path}/board/events.*File too large; make room"):
            board.write(1, {"loss/train": 1.0})
        with pytest.raises(UserError, match=rf"{tmp_path}/metrics.jsonl: File too large; make room"):
            for step in range(100):
                lines.write(step, {"loss/train": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_storage_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a storage cannot be had here: the system call answers as it would."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"{tmp_path}/run.lock: the storage has no file locks .* mounted as"):
        RunFolder(tmp_path).lock()
