"""Steps that are damaged, torn, renamed or left behind: named and passed over, and never removed if they were whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import steps
from pretrain.checkpoint.manifest import Manifest, check_sizes
from pretrain.checkpoint.steps import step_name
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import SHAPES, make_state
from tests.pretrain.checkpoint.stores import contents, flip_bit, open_alone, save_all


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def edit_manifest(folder: Path, field: str, value: object, *, of_file: str | None = None) -> None:
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    (manifest if of_file is None else manifest["files"][of_file])[field] = value
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip_bit, r"__0_0\.distcp has been altered"),
    "truncated file": (truncate, r"__0_0\.distcp has [\d,]+ bytes, not [\d,]+"),
    "missing data": (lambda folder: next(folder.glob("*.distcp")).unlink(), r"__0_0\.distcp is missing"),
    "missing metadata": (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
    "edited meta": (
        lambda folder: (folder / "meta.json").write_text('{\n "step": 5\n}'),
        r"meta\.json has been altered",
    ),
    "missing manifest": (lambda folder: (folder / "MANIFEST.json").unlink(), "this step was whole once"),
    "empty manifest": (lambda folder: (folder / "MANIFEST.json").write_text(""), "cannot be read"),
    "strange manifest": (lambda folder: (folder / "MANIFEST.json").write_text("[]"), "cannot be read"),
    "step in words": (lambda folder: edit_manifest(folder, "step", "4"), "step is '4', not of type int"),
    "size in words": (
        lambda folder: edit_manifest(folder, "bytes", "123", of_file="meta.json"),
        r"meta\.json: bytes is '123', not of type int",
    ),
    "time beyond dates": (
        lambda folder: edit_manifest(folder, "written_at", 9e99),
        r"written_at is 9e\+99, not a time",
    ),
    "another step's number": (
        lambda folder: edit_manifest(folder, "step", 3),
        "is of step 3, not of step_00000004",
    ),
    "newer format": (lambda folder: edit_manifest(folder, "format_version", 2), "format version 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_named_and_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm, message = DAMAGES[damage]
    save_all(open_alone(tmp_path), 2, 4)
    newest = tmp_path / "step_00000004"
    harm(newest)
    store = open_alone(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.latest() == tmp_path / "step_00000002"
    assert "step_00000004" in caplog.text
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(caplog.text)
    with pytest.raises(CheckpointError, match=message):
        store.load(newest, make_state(0))
    with pytest.raises(CheckpointError, match=message):
        store.load_weights(newest, {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    assert [info.problem is None for info in store.steps(checksums=True)] == [True, False]
    save_all(store, 4)
    assert open_alone(tmp_path).latest() == newest


def test_a_copy_under_another_number_is_not_taken_for_that_step(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 3)
    shutil.copytree(tmp_path / "step_00000003", tmp_path / "step_00000009")
    shutil.copytree(tmp_path / "step_00000003", tmp_path / "best")
    store = open_alone(tmp_path)
    assert store.latest() == tmp_path / "step_00000003"
    with pytest.raises(CheckpointError, match="of step 3, not of step_00000009: the folder was renamed"):
        store.load(tmp_path / "step_00000009", make_state(0))
    assert store.load(tmp_path / "best", make_state(0)) == {"step": 3}


def test_a_step_that_is_removed_while_it_is_inspected_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(open_alone(tmp_path), 2, 4)
    original = check_sizes
    leave: list[str] = []

    def remove_first(folder: Path, manifest: Manifest) -> None:
        if folder.name == "step_00000002":
            for file in folder.iterdir():
                if file.name not in leave:
                    file.unlink()
            if not leave:
                folder.rmdir()
        original(folder, manifest)

    monkeypatch.setattr("pretrain.checkpoint.steps.check_sizes", remove_first)
    leave.append(".metadata")
    assert [(info.step, info.is_torn) for info in steps.list_steps(tmp_path)] == [(2, True), (4, False)]
    monkeypatch.undo()
    save_all(open_alone(tmp_path), 2)
    monkeypatch.setattr("pretrain.checkpoint.steps.check_sizes", remove_first)
    leave.clear()
    assert [info.step for info in steps.list_steps(tmp_path)] == [4]
    assert steps.step_info(tmp_path / "step_00000002") is None


def test_what_interrupted_saves_left_is_removed_and_what_was_saved_is_not(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 2, 4)
    (tmp_path / "step_00000004" / "MANIFEST.json").unlink()
    before = contents(tmp_path / "step_00000004")
    for left in ("step_00000005.partial", "step_00000006.attempt-0001", "step_00000001.removed"):
        (tmp_path / left).mkdir()
    save_all(open_alone(tmp_path), 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(n) for n in (2, 4, 6)]
    assert contents(tmp_path / "step_00000004") == before
    # The run comes to that step again: its own takes the name.
    save_all(open_alone(tmp_path), 4)
    assert contents(tmp_path / "step_00000004.aside-1") == before
    assert [info.problem for info in open_alone(tmp_path).steps(checksums=True)] == [None] * 3


def test_without_manifests_nothing_begins_anew(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 2, 4)
    for step in (2, 4):
        (tmp_path / step_name(step) / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"no step .* is whole.*step_00000004: MANIFEST.json is gone"):
        open_alone(tmp_path).latest()


def test_a_removal_that_is_interrupted_leaves_no_step_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(open_alone(tmp_path), 2)

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.checkpoint.steps.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.remove_step(tmp_path / "step_00000002")
    monkeypatch.undo()
    assert open_alone(tmp_path).latest() is None
    save_all(open_alone(tmp_path), 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
