"""`triptych status`: what it says of runs in every state, at every width, and to programs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import slurm, watch_commands
from launch.job import LaunchedRun
from launch.settings import ClusterSettings
from launch.status import read_status, status_text
from launch.watch_commands import overview, show_status
from pretrain.attempts import tell_stage, write_json
from pretrain.errors import UserError
from tests.launch.test_submit import DEMO

from pretrain.config import load_config  # isort: skip


def launched(folder: Path, name: str = "some-run", jobs: tuple[str, ...] = ("7",)) -> LaunchedRun:
    run = LaunchedRun(folder / name)
    run.folder.mkdir(parents=True)
    run.config.write_text(load_config(DEMO).to_yaml())
    run.write_job(ClusterSettings(), nodes=2, name=name, jobs=list(jobs))
    return run


def begun(run: LaunchedRun, **metrics: Any) -> None:
    run.launch.begin(1, job="7", nodes=["node1"], step_before=0)
    run.launch.record("attempt", attempt=1, job="7", nodes=["node1"], step_before=0)
    logs = run.run / "logs"
    logs.mkdir(exist_ok=True)
    if metrics:
        (logs / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[slurm.QueuedJob]:
    """What Slurm knows; the rest of its answers is left out."""
    known: list[slurm.QueuedJob] = []
    monkeypatch.setattr(slurm, "queue", lambda jobs, patience_s=0: [job for job in known if job.job in jobs])
    monkeypatch.setattr(slurm, "past_states", lambda jobs: {})
    return known


def running(job: str = "7", state: str = "RUNNING") -> slurm.QueuedJob:
    return slurm.QueuedJob(job, "some-run", state, "None", "N/A", "node[1-2]", "1:00")


def the_status(run: LaunchedRun) -> Any:
    (found,), _ = read_status([run])
    return found


METRICS = {
    "step": 100,
    "loss/train": 2.34567,
    "loss/validation": 2.4,
    "speed/tokens_per_second": 123456.0,
    "speed/step_seconds": 3.0,
}


def test_a_cancelled_run_that_slurm_forgot_is_cancelled(tmp_path: Path, queue: list[Any]) -> None:
    by_command, by_slurm, again, lost = (launched(tmp_path, name) for name in ("a", "b", "c", "d"))
    by_command.launch.record("cancel", jobs=["7"])
    by_slurm.launch.record("attempt", attempt=1)
    by_slurm.launch.record("attempt_end", attempt=1, ending="cancelled", step=0)
    again.launch.record("cancel", jobs=["7"])
    again.write_jobs(["8"])
    again.launch.record("launch", jobs=["8"])
    states = {run.run.name: the_status(run).state for run in (by_command, by_slurm, again, lost)}
    assert states == {"a": "cancelled", "b": "cancelled", "c": "not in the queue", "d": "not in the queue"}


def test_where_slurm_does_not_answer_nothing_is_claimed(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("squeue did not answer in 20 s")

    monkeypatch.setattr(slurm, "queue", refuse)
    (status,), problem = read_status([launched(tmp_path)])
    assert status.state == "unknown" and problem is not None


@pytest.mark.parametrize("ending", ["done", "crash", "configuration"])
def test_a_run_that_has_ended_has_no_time_left(tmp_path: Path, queue: list[Any], ending: str) -> None:
    run = launched(tmp_path)
    begun(run, **METRICS)
    queue.append(running())
    assert the_status(run).seconds_left == 300 * 3.0
    write_json(run.outcome_file, {"ending": ending, "message": "it has"})
    for known in ([running()], [running(state="COMPLETED")], []):
        queue[:] = known
        status = the_status(run)
        assert status.state == ending and status.seconds_left is None
        text = str(status_text([status], 200))
        assert "left" not in text and "next in" not in text


def test_a_run_out_of_the_queue_has_no_time_left(tmp_path: Path, queue: list[Any]) -> None:
    run = launched(tmp_path)
    begun(run, **METRICS)
    assert the_status(run).seconds_left is None


def test_what_the_start_up_does_is_shown(tmp_path: Path, queue: list[Any]) -> None:
    run = launched(tmp_path)
    queue.append(running())
    begun(run)
    tell_stage(run.run, "building the model and its engine", 1)
    status = the_status(run)
    assert status.stage[0] == "building the model and its engine" and 0 <= status.stage[1] < 5
    assert "node[1-2]: building the model and its engine (0 s)" in str(status_text([status], 200))
    assert status.facts()["stage"] == "building the model and its engine"
    run.launch.record("start", attempt=1, step=0)
    assert the_status(run).stage is not None, "nothing is logged yet"
    time.sleep(0.01)
    (run.run / "logs" / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    assert the_status(run).stage is None
    assert "node[1-2]," in str(status_text([the_status(run)], 200))


@pytest.mark.parametrize("name", ["x", "a-run-with-a-long-name-as-sweeps-have-them-lr-0.001-seed-12"])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 250])
def test_nothing_is_cut_off_at_any_width(tmp_path: Path, queue: list[Any], width: int, name: str) -> None:
    runs = [launched(tmp_path, name), launched(tmp_path, "pending", ("8",))]
    queue += [running(), slurm.QueuedJob("8", "pending", "PENDING", "Priority", "N/A", "", "0:00")]
    begun(runs[0], **METRICS)
    statuses, _ = read_status(runs)
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    console.print(overview(statuses, console))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= max(width, len(name))
    assert "…" not in text
    assert name in text.replace("\n", "")
    for piece in ("running", "node[1-2]", "100/400", "2.3457", "2.4000", "123,456", "Priority"):
        assert piece in text


def test_piped_it_is_a_table_of_whole_lines(tmp_path: Path, queue: list[Any], capsys: Any) -> None:
    long = "a-run-with-a-name-that-is-longer-than-eighty-columns-" + "x" * 60
    run = launched(tmp_path, long)
    queue.append(running())
    begun(run, **METRICS)
    show_status(tmp_path, [], watch=None, details=False, sort="name")
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "job", "state"] and row.split()[:3] == [long, "7", "running"]
    assert "…" not in row and len(row) > 150


def test_as_json(tmp_path: Path, queue: list[Any], capsys: Any) -> None:
    run = launched(tmp_path)
    queue.append(running())
    begun(run, **{**METRICS, "loss/train": float("nan")})
    show_status(tmp_path, [], watch=None, details=False, sort="name", json_output=True)
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (one,) = found["runs"]
    assert found["problem"] is None
    assert (one["run"], one["job"], one["state"], one["step"]) == ("some-run", "7", "running", 100)
    assert one["validation_loss"] == 2.4 and one["seconds_left"] == 900 and one["loss"] is None
    with pytest.raises(UserError, match="--json with --watch"):
        show_status(tmp_path, [], watch=1.0, details=False, sort="name", json_output=True)
    show_status(tmp_path / "nothing", [], watch=None, details=False, sort="name", json_output=True)
    assert json.loads(capsys.readouterr().out) == {"runs": [], "problem": None}


DAMAGED = {
    "job.json": ["[" * 100_000, "x", ""],
    "attempt.json": ["[" * 100_000, "x"],
    "outcome.json": ["[" * 100_000, "x"],
    "config.yaml": ["[" * 3000, "a: &a [*a]", "!!python/name:os.system"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, texts in DAMAGED.items() for content in texts]
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, queue: list[Any], name: str, content: str) -> None:
    run = launched(tmp_path)
    (run.folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        show_status(tmp_path, [], watch=None, details=False, sort="name")


def test_cancel_without_a_name_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"triptych status --runs '.*a b'` lists them"):
        watch_commands.cancel_runs(tmp_path / "a b", [])


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path, queue: list[Any]) -> None:
    run = launched(tmp_path)
    begun(run, **METRICS)
    queue.append(running())
    assert the_status(run).damaged_lines == 0
    with (run.run / "logs" / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 101, "loss\x00\n[1]\n{"step": 102, "lo'
        )  # the last is torn, as a crash leaves it
    with (run.run / "ledger.jsonl").open("ab") as file:
        file.write(b"not JSON\n")
    found = the_status(run)
    assert found.damaged_lines == found.facts()["damaged_lines"] == 3
    assert "3 damaged log lines left out" in status_text([found], 200).plain
