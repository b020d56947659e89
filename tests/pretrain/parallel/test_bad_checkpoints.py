"""Checkpoints of tensor-parallel pipelines that are damaged, or another model's: one report, each with the fix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from pretrain.loop import train
from tests.e2e.training import run_forked
from tests.pretrain.parallel.pipelines import run_in
from tests.pretrain.parallel.runs import Datasets, write_run
from tests.pretrain.parallel.table import LAYERS

STEPS = 4
SAVE = "checkpoint.save_every_steps=2"
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1", "data.micro_batch_rows=2", SAVE]
FIX = "Put the files back from a copy"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Datasets) -> Path:
    """A run of four ranks, each with another part of the model, with steps 2 and 4 saved."""
    folder = tmp_path_factory.mktemp("saved")
    run_in(folder, data, "sigmoid", 4, TP2_PP2, train, steps=STEPS)
    return folder


@pytest.fixture
def run(tmp_path: Path, saved: Path, data: Datasets) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    write_run(tmp_path / "copy", data, "sigmoid", STEPS + 2)
    return tmp_path / "copy"


def step(run: Path, number: int) -> Path:
    return run / "runs" / "tiny" / "checkpoints" / f"step_{number:08d}"


def damage_two(folder: Path) -> None:
    """The first stage's file is gone, the last one's cut short."""
    (folder / "__1_0.distcp").unlink()
    cut(folder / "__3_0.distcp", lambda content: content[:-100])


def cut(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def go_on(run: Path, *overrides: str) -> tuple[int, str]:
    """Train on with one process."""
    ended = run_forked("train", str(run / "tiny.yaml"), "--quiet", LAYERS, *overrides)
    assert "Traceback" not in ended.errors
    return ended.code, ended.errors


def test_all_damaged_files_are_named_and_the_step_before_is_used(run: Path) -> None:
    damage_two(step(run, 4))
    code, errors = go_on(run)
    assert code == EXIT_DONE, errors
    (warning,) = [line for line in errors.splitlines() if "passed over" in line]
    assert "step_00000004" in warning
    assert "__1_0.distcp is missing" in warning and "__3_0.distcp has" in warning


def test_without_a_whole_step_the_run_refuses_and_leaves_what_is_there(run: Path) -> None:
    damage_two(step(run, 4))
    cut(step(run, 2) / "__2_0.distcp", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    before = {path: path.read_bytes() for number in (2, 4) for path in step(run, number).iterdir()}
    code, errors = go_on(run)
    assert code == EXIT_USER_ERROR
    report = errors[errors.index("no step in") :]
    for told in ("__1_0.distcp is missing", "__3_0.distcp has", "__2_0.distcp has been altered", FIX):
        assert told in report
    assert before == {path: path.read_bytes() for number in (2, 4) for path in step(run, number).iterdir()}


def test_a_damaged_step_asked_for_by_number_says_what_to_do(run: Path) -> None:
    damage_two(step(run, 4))
    folder = str(run / "runs" / "tiny")
    ended = run_forked("generate", folder, "--step", "4", "--tokens", "2")
    assert ended.code == EXIT_USER_ERROR
    for told in ("__1_0.distcp is missing", "__3_0.distcp has", FIX):
        assert told in ended.errors
    verified = run_forked("checkpoint", "verify", folder)
    assert verified.code == 1 and "__3_0.distcp" in verified.output


def test_another_model_is_told_with_every_difference(run: Path) -> None:
    code, errors = go_on(run, "model.width=64", "model.kv_heads=4")
    assert code == EXIT_USER_ERROR
    assert "model.width: 32 in the checkpoint, 64 in the config" in errors
    assert "model.kv_heads: 2 in the checkpoint, 4 in the config" in errors
