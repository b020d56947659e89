"""`triptych logs` and how runs are found by name."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from launch.job import LaunchedRun
from launch.settings import ClusterSettings
from launch.status import find_runs
from launch.watch_commands import show_logs, show_status
from pretrain.attempts import write_json
from pretrain.errors import UserError


def launched(folder: Path, name: str) -> LaunchedRun:
    run = LaunchedRun(folder / name)
    run.write_job(ClusterSettings(), nodes=1, name=name, jobs=[])
    return run


def write_log(run: LaunchedRun, attempt: int, text: str) -> None:
    path = run.log(0, attempt)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(text)


@pytest.mark.timeout(30)
def test_following_begins_before_the_first_attempt_and_goes_on_with_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path, "a")

    def live() -> None:
        time.sleep(0.2)
        run.launch.begin(1)
        write_log(run, 1, "one\n")
        time.sleep(0.8)
        write_log(run, 1, "two\n")
        run.launch.begin(2)
        write_log(run, 2, "three\n")
        write_json(run.outcome_file, {"ending": "done", "message": ""})

    writer = threading.Thread(target=live)
    writer.start()
    show_logs(tmp_path, "a", follow=True, rank=0, attempt=None, lines=50)
    writer.join()
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_the_last_lines_and_a_log_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path, "a")
    run.launch.begin(1)
    write_log(run, 1, "one\ntwo\nthree\n")
    show_logs(tmp_path, "a", follow=False, rank=0, attempt=None, lines=2)
    assert capsys.readouterr().out == "two\nthree\n"
    with pytest.raises(UserError, match=r"there are: rank-00000\.attempt-0001\.log"):
        show_logs(tmp_path, "a", follow=False, rank=3, attempt=None, lines=2)


def test_runs_are_found_by_name_pattern_and_path(tmp_path: Path) -> None:
    runs = [launched(tmp_path, name) for name in ("lr-1", "lr-2", "other")]
    assert find_runs(tmp_path, []) == runs
    assert find_runs(tmp_path, ["lr-*", "lr-1"]) == runs[:2]
    assert find_runs(Path("nowhere"), [str(tmp_path / "other")]) == runs[2:]
    for name in ("none", "", str(tmp_path / "none")):
        with pytest.raises(UserError, match="no launched run"):
            find_runs(tmp_path, [name])


def test_the_status_of_a_run_shows_any_text_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    run = launched(tmp_path, "lr-[bold]")
    reason = "Read error in [/src/tcp/pair.cc:537] :smile:"
    run.launch.record("attempt_end", attempt=1, ending="crash", reason=reason, step=0)
    show_status(tmp_path, [], watch=None, details=True, sort="name")
    shown = capsys.readouterr().out
    assert reason in shown and "lr-[bold]" in shown
