"""Printed commands, pasted into a real shell: each does what is said and runs nothing else."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage.dataset import read_dataset
from launch import slurm
from launch.commands import _say_submitted
from launch.request import Request, absolute
from launch.settings import ClusterSettings
from launch.submission_checks import check_data, refuse_a_second_job
from pretrain.attempts import write_json
from pretrain.checkpoint.steps import telling_how_to_restore
from pretrain.commands.console import plain_console
from pretrain.config import load_config
from pretrain.config.merge import merged_values
from pretrain.errors import CheckpointError, UserError
from pretrain.typed import override, typed, typed_for_runs
from tests.corpus import build_corpus
from tests.launch.test_status import launched, running
from tests.launch.test_submit import DEMO

NASTY = "a b; touch pasted; $(touch pasted) `touch pasted` 'q' \"d\" & # * ? [x] {y} ~ ! \\ é"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / NASTY
    found.mkdir()
    return found


def pasted(command: str, where: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """What a shell does with a line, with this project's `triptych` on its PATH."""
    bin_ = where / "bin"
    bin_.mkdir(exist_ok=True)
    program = bin_ / "triptych"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path.cwd()),
        "COLUMNS": "80",
    }
    ended = subprocess.run(
        ["bash", "-c", " ".join([command, *more])],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert not (where / "pasted").exists(), "something in a path was run"
    assert "Traceback" not in ended.stderr, ended
    return ended


def commands_in(text: str) -> list[str]:
    """Those between backticks, each as far as a shell finds its quotes closed, or at the end of a line."""
    found = []
    for start in re.finditer(r"(`|: +)(?=[^\s`]*triptych )", text):
        rest = text[start.end() :].split("\n")[0]
        ends = [match.start() for match in re.finditer("`", rest)] if start[1] == "`" else [len(rest)]
        found.append(next(rest[:end] for end in ends if is_closed(rest[:end])))
    return found


def is_closed(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True


def test_words_are_words_to_a_shell(folder: Path, tmp_path: Path) -> None:
    line = typed(NASTY, "", "--x", program="printf").replace("printf", r"printf '<%s>\n'", 1)
    assert pasted(line, tmp_path).stdout == f"<{NASTY}>\n<>\n<--x>\n"


@pytest.mark.parametrize("value", [NASTY, "12", "true", "null", "a: b", "${oc.env:HOME}x", "- a", "", "1e-3"])
def test_an_override_is_read_back_as_its_text(value: str) -> None:
    assert merged_values(Path(DEMO), [override("data.path", value)])["data"]["path"] == value


def test_what_a_launch_says(folder: Path, tmp_path: Path, capsys: Any) -> None:
    run = launched(folder, "some-run")
    (run.run / "logs").mkdir()
    run.log(0, 1).write_text("hello from rank 0\n")
    write_json(run.outcome_file, {"ending": "done", "message": "it has finished"})
    config = absolute(load_config(DEMO, [override("run.folder", folder), "run.name=some-run"]))
    request = Request(name="some-run", configs=(config,), settings=ClusterSettings(), nodes=1)
    _say_submitted(request, ["7"], plain_console(soft_wrap=True))
    status, logs, cancel = commands_in(capsys.readouterr().out)
    shown = pasted(status, tmp_path)
    assert shown.returncode == 0 and "some-run" in shown.stdout, shown
    logged = pasted(logs, tmp_path)
    assert logged.returncode == 0 and "hello from rank 0" in logged.stdout, logged
    ended = pasted(cancel, tmp_path)
    assert "no launched run of this name" not in ended.stderr, ended


def test_a_run_that_is_launched_already(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = launched(folder, "some-run")
    monkeypatch.setattr(slurm, "queue", lambda jobs, patience_s=0: [running()])
    with pytest.raises(UserError) as caught:
        refuse_a_second_job(run)
    (command,) = commands_in(str(caught.value))
    assert "cancel" in command and "--runs" in command
    assert "no launched run of this name" not in pasted(command, tmp_path).stderr


def test_no_runs_option_where_runs_are_looked_for_anyway(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed_for_runs("status", "x", Path("runs")).endswith("triptych status x")
    assert typed_for_runs("status", "x-*", tmp_path / "runs").endswith("triptych status 'x-*'")
    assert typed_for_runs("logs", "x", Path("other"), "-f").endswith("triptych logs -f x --runs other")


def test_a_damaged_step(folder: Path, tmp_path: Path) -> None:
    step = folder / "run" / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught, telling_how_to_restore(step):
        raise CheckpointError("it is damaged")
    (command,) = commands_in(str(caught.value))
    assert "step" in pasted(command, tmp_path).stdout


def test_a_dataset_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(folder / "data")
    commands = commands_in(str(caught.value))
    assert len(commands) == 2 and "--out" in commands[0]
    assert pasted(commands[1], tmp_path).returncode == 0
    ended = pasted(commands[0], tmp_path, "--help")
    assert ended.returncode == 0, ended


def test_a_launch_says_at_once_that_a_dataset_is_not_there(tmp_path: Path) -> None:
    config = absolute(load_config(DEMO, [f"data.path={tmp_path / 'none'}"]))
    request = Request(name="x", configs=(config,), settings=ClusterSettings(), nodes=1)
    with pytest.raises(DataError, match="none: no such dataset folder"):
        check_data(request)
    inside = Request(name="x", configs=(config,), settings=ClusterSettings(container="image.sqsh"), nodes=1)
    check_data(inside)  # whose paths are not this machine's
    ended = pasted(
        typed("launch", Path(DEMO).resolve(), "--local", f"data.path={tmp_path / 'none'}"), tmp_path
    )
    assert ended.returncode == 2 and "none: no such dataset folder" in ended.stderr


def test_what_data_build_says_to_train_with(folder: Path, tmp_path: Path) -> None:
    source = folder / "texts"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text("some words of a text. " * 20)
    out = folder / "data"
    line = typed("data", "build", source, "--out", out, "--tokenizer", "bytes")
    ended = pasted(line, tmp_path)
    assert ended.returncode == 0, ended
    (command,) = commands_in(ended.stdout)
    printed = pasted(command, tmp_path, "--print-config")
    assert printed.returncode == 0, printed
    assert read_dataset(Path(printed_path(printed.stdout))).path == out


def printed_path(config: str) -> str:
    import yaml

    found: str = yaml.safe_load(config)["data"]["path"]
    return found


def test_the_corpus_is_a_dataset(tmp_path: Path) -> None:
    config = absolute(load_config(DEMO, [f"data.path={build_corpus(tmp_path, documents=30)}"]))
    check_data(Request(name="x", configs=(config,), settings=ClusterSettings(), nodes=1))
