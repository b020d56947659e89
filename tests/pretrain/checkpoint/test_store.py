"""The store: what it keeps, what it passes over, what it refuses, and how it fails."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState, steps
from pretrain.checkpoint.boxes import Boxes
from pretrain.checkpoint.manifest import Manifest, check_sizes
from pretrain.checkpoint.staging import Stager, Views
from pretrain.checkpoint.steps import step_name
from pretrain.errors import CheckpointError
from tests.harness import RanksFailed, run_ranks
from tests.pretrain.checkpoint.states import SHAPES, is_equal, make_state


def open_alone(folder: Path, *, keep_last: int = 9, keep_every_steps: int | None = None) -> CheckpointStore:
    """A store of one process without torch.distributed."""
    return CheckpointStore(folder, group=None, keep_last=keep_last, keep_every_steps=keep_every_steps)


def save_all(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, make_state(step))
    store.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_process_without_distributed_saves_and_loads(tmp_path: Path, asynchronous: bool) -> None:
    store = CheckpointStore(
        tmp_path / "new" / "checkpoints",
        group=None,
        keep_last=2,
        asynchronous=asynchronous,
        writer_id="run-7",
    )
    saved = make_state(3, meta={"cursor": [1, 2], "note": "é"})
    saved.rank_bytes = b"random"
    assert store.save(3, saved) >= 0
    store.wait()
    path = open_alone(store.folder).latest()
    assert path is not None and path.name == "step_00000003"
    loaded = make_state(0)
    assert open_alone(store.folder).load(path, loaded) == saved.meta
    assert is_equal(saved, loaded) and loaded.rank_bytes == b"random"
    assert json.loads((path / "meta.json").read_text()) == saved.meta == store.read_meta(path)
    assert json.loads((path / "MANIFEST.json").read_text())["writer_id"] == "run-7"


def test_the_tensors_may_change_while_they_are_written(tmp_path: Path) -> None:
    store, state = open_alone(tmp_path), make_state(1)
    for step in (1, 2):
        store.save(step, state)
        assert store.wait_staged() >= 0
        for fragment in state.fragments:
            fragment.tensors["master"].add_(1)
    store.wait()
    loaded, expected = make_state(0), make_state(1)
    store.load(tmp_path / "step_00000002", loaded)
    for fragment in expected.fragments:
        fragment.tensors["master"].add_(1)
    assert is_equal(loaded, expected)


def test_meta_and_step_counts_are_those_at_the_save(tmp_path: Path) -> None:
    store, state = open_alone(tmp_path), make_state(1)
    state.meta = {"hooks": {"seen": [1]}}
    store.save(1, state)
    state.meta["hooks"]["seen"].append(2)
    store.wait_staged()
    for fragment in state.fragments:
        fragment.step.add_(1)
    loaded = make_state(0)
    assert store.load(tmp_path / "step_00000001", loaded) == {"hooks": {"seen": [1]}}
    assert is_equal(loaded, make_state(1))


def hold_up_staging(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """Let the thread do something before it copies."""
    original = Stager.stage

    def stage(self: Stager, views: Views) -> dict[str, Boxes]:
        wait()
        return original(self, views)

    monkeypatch.setattr(Stager, "stage", stage)


def test_a_save_does_not_wait_for_the_copy_and_the_update_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_up_staging(monkeypatch, lambda: time.sleep(0.5))
    store = open_alone(tmp_path)
    in_save_s = store.save(1, make_state(1))
    in_update_s = store.wait_staged()
    assert in_save_s < 0.25 < in_update_s
    assert store.blocked_s == in_save_s + in_update_s
    assert store.wait_staged() == 0
    store.wait()


def test_a_change_before_the_copy_is_done_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = threading.Event()
    hold_up_staging(monkeypatch, lambda: changed.wait(timeout=20))
    store, state = open_alone(tmp_path), make_state(2)
    store.save(2, state)
    state.fragments[1].tensors["exp_avg"].add_(1)
    changed.set()
    with pytest.raises(
        CheckpointError, match=r"step_00000002 could not be saved.*call the store's wait_staged"
    ):
        store.wait()
    assert store.steps() == []


def train_fused(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_update_by_fused_adam_before_the_copy_is_done_fails_the_save(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(40))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    train_fused(parameter, optimizer)
    adam = optimizer.state[parameter]
    tensors = {
        "master": parameter.detach(),
        "exp_avg": adam["exp_avg"],
        "exp_avg_sq": adam["exp_avg_sq"],
    }
    fragment = Fragment("weight", (40,), 0, tensors, adam["step"], Placement.whole((40,)))
    store = CheckpointStore(tmp_path, group=None, keep_last=9, asynchronous=asynchronous)
    store.save(1, TrainingState([fragment]))
    store.wait_staged()
    train_fused(parameter, optimizer)
    store.wait()
    updated = threading.Event()
    if asynchronous:
        hold_up_staging(monkeypatch, lambda: updated.wait(timeout=20))
    else:
        hold_up_staging(monkeypatch, lambda: train_fused(parameter, optimizer))
    with pytest.raises(CheckpointError, match=r"step_00000002 could not be saved.*wait_staged"):
        store.save(2, TrainingState([fragment]))
        train_fused(parameter, optimizer)
        updated.set()
        store.wait()
    assert [info.step for info in store.steps(checksums=True)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_failed_copy_spares_the_folder_that_it_would_have_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(open_alone(tmp_path), 2)
    hold_up_staging(monkeypatch, lambda: torch.empty(1 << 60))
    store = open_alone(tmp_path)
    store.save(2, make_state(3))
    with pytest.raises(
        CheckpointError, match=r"could not be saved: RuntimeError.*step_00000002 is still whole"
    ):
        store.wait_staged()
    store.wait()  # a failure is raised once
    assert store.latest() == tmp_path / "step_00000002"


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path, keep_last=2, keep_every_steps=20), *range(5, 50, 5))
    assert [info.step for info in open_alone(tmp_path).steps()] == [20, 40, 45]


def test_retention_leaves_steps_of_an_abandoned_course_and_replaces_them_in_turn(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 10, 20, 30)
    rewound = open_alone(tmp_path, keep_last=1)
    rewound.load(tmp_path / "step_00000010", make_state(0))
    rewound.save(15, make_state(15))
    rewound.save(20, make_state(99))
    rewound.wait()
    assert [info.step for info in rewound.steps(checksums=True)] == [20, 30]
    loaded = make_state(0)
    rewound.load(tmp_path / "step_00000020", loaded)
    assert is_equal(loaded, make_state(99))


def test_a_step_that_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 7)
    written = (tmp_path / "step_00000007" / "MANIFEST.json").stat().st_mtime_ns
    resumed = open_alone(tmp_path)
    assert resumed.latest() is not None
    save_all(resumed, 7, 7)
    assert (tmp_path / "step_00000007" / "MANIFEST.json").stat().st_mtime_ns == written


def test_starting_from_another_run_does_not_count_as_having_saved(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path / "old"), 7)
    store = open_alone(tmp_path / "new")
    store.load(tmp_path / "old" / "step_00000007", make_state(0))
    save_all(store, 7)
    assert [info.step for info in store.steps(checksums=True)] == [7]


def flip_bit(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


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


def test_the_first_save_makes_the_names_of_new_folders_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_all(open_alone(tmp_path / "run" / "checkpoints"), 1)
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")} <= set(synced)


def test_a_save_without_distributed_does_not_warn_of_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, group=None, keep_last=9, asynchronous=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.save(1, make_state(1))
        store.load(tmp_path / "step_00000001", make_state(0))
        warnings.warn("torch.distributed is disabled", UserWarning, stacklevel=1)
    shown = [str(warning.message) for warning in caught if "is disabled" in str(warning.message)]
    assert shown == ["torch.distributed is disabled"], "only the one that is not ours"


def test_an_empty_folder_has_no_latest_step(tmp_path: Path) -> None:
    assert open_alone(tmp_path / "nothing").latest() is None
    assert open_alone(tmp_path / "nothing").steps() == []


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


CHANGED_MODELS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "reshaped": (
        {**SHAPES, "norm.weight": (9,)},
        r"norm\.weight is \(8,\) in the checkpoint and \(9,\) in the model",
    ),
    "added": ({**SHAPES, "bias": (3,)}, r"the checkpoint lacks bias"),
    "removed": ({"norm.weight": (8,)}, r"the model lacks embedding\.weight, head\.weight"),
}


@pytest.mark.parametrize("change", CHANGED_MODELS)
def test_another_model_is_refused_with_the_parameter_named(change: str, tmp_path: Path) -> None:
    shapes, message = CHANGED_MODELS[change]
    store = open_alone(tmp_path)
    save_all(store, 1)
    state = make_state(0, shapes)
    with pytest.raises(CheckpointError, match=message):
        store.load(tmp_path / "step_00000001", state)
    assert is_equal(state, make_state(0, shapes)), "nothing is loaded in part"
    with pytest.raises(CheckpointError, match=message):
        store.load_weights(tmp_path / "step_00000001", {name: torch.zeros(s) for name, s in shapes.items()})


def test_parameters_that_share_a_counter_must_agree_on_it(tmp_path: Path) -> None:
    store, state = open_alone(tmp_path), make_state(5)
    state.fragments[1].step.fill_(4)
    store.save(5, state)
    shared = make_state(0)
    counter = torch.zeros(())
    for fragment in shared.fragments:
        object.__setattr__(fragment, "step", counter)
    with pytest.raises(CheckpointError, match=r"5 for embedding\.weight and 4 for norm\.weight"):
        store.load(tmp_path / "step_00000005", shared)


def test_weights_load_into_a_plain_model_of_another_type(tmp_path: Path) -> None:
    store, state = open_alone(tmp_path), make_state(1)
    store.save(1, state)
    store.wait()
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    CheckpointStore.load_weights(tmp_path / "step_00000001", weights)
    for fragment in state.fragments:
        expected = fragment.tensors["master"].view(fragment.local_shape).bfloat16()
        assert torch.equal(weights[fragment.name], expected)


def test_plain_dcp_reads_the_files(tmp_path: Path) -> None:
    state = make_state(1)
    open_alone_store = open_alone(tmp_path)
    open_alone_store.save(1, state)
    open_alone_store.wait()
    weights = {f"master.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp_load(weights, storage_reader=FileSystemReader(tmp_path / "step_00000001"), no_dist=True)
    for fragment in state.fragments:
        assert torch.equal(weights[f"master.{fragment.name}"].flatten(), fragment.tensors["master"])


def test_fragments_that_do_not_fill_a_parameter_are_refused(tmp_path: Path) -> None:
    store, state = open_alone(tmp_path), make_state(1)
    object.__setattr__(state.fragments[0], "placement", Placement.whole((62, 8)))
    store.save(1, state)
    with pytest.raises(CheckpointError, match=r"embedding\.weight: the ranks hold 488 of 496 elements"):
        store.wait()


def test_meta_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        open_alone(tmp_path).save(1, make_state(1, meta={"path": tmp_path}))


# ---- several ranks


def save_on_ranks(folder: Path, *steps: int) -> None:
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), keep_last=9)
    for step in steps:
        store.save(step, make_state(step, rank=dist.get_rank(), ranks=dist.get_world_size()))
    store.wait()


def load_on_ranks(folder: Path, seed: int) -> bool:
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), keep_last=9)
    path = store.latest()
    assert path is not None and path.name == f"step_{seed:08d}"
    state = make_state(0, rank=dist.get_rank(), ranks=dist.get_world_size())
    store.load(path, state)
    return is_equal(state, make_state(seed, rank=dist.get_rank(), ranks=dist.get_world_size()))


@pytest.mark.parametrize(("save_ranks", "load_ranks"), [(1, 3), (3, 2), (2, 4), (4, 1)])
def test_ranges_cut_anywhere_load_in_ranges_cut_elsewhere(
    save_ranks: int, load_ranks: int, tmp_path: Path
) -> None:
    run_ranks(save_ranks, save_on_ranks, tmp_path, 3)
    assert all(run_ranks(load_ranks, load_on_ranks, tmp_path, 3))


def test_all_ranks_pass_over_a_step_that_one_found_damaged(tmp_path: Path) -> None:
    run_ranks(2, save_on_ranks, tmp_path, 2, 4)
    flip_bit(tmp_path / "step_00000004")
    assert all(run_ranks(2, load_on_ranks, tmp_path, 2))


def save_with_a_small_disk(folder: Path, full_rank: int) -> tuple[str, list[str]]:
    """Save step 2, then step 4 while one rank can write no file beyond a few KiB."""
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), keep_last=9)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store.save(2, make_state(2, rank=rank, ranks=ranks))
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    store.save(4, make_state(4, rank=rank, ranks=ranks))
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    store.wait()  # a failure is raised once
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.save(6, make_state(6, rank=rank, ranks=ranks))
    store.wait()
    return str(caught.value), left


@pytest.mark.parametrize(("ranks", "full_rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_write_that_fails_on_one_rank_is_raised_on_all(ranks: int, full_rank: int, tmp_path: Path) -> None:
    results = run_ranks(ranks, save_with_a_small_disk, tmp_path, full_rank)
    for message, left in results:
        assert "step_00000004 could not be saved" in message and "File too large" in message
        assert ("bytes are needed on each of 2 ranks" in message) == (ranks > 1)
        assert "bytes are free" in message and "step_00000002 is still whole" in message
        assert (f"rank {full_rank}: " in message) == (ranks > 1) and "OSError" in message
        assert left == ["step_00000002"], "the torn folder is gone"
    assert [info.problem for info in open_alone(tmp_path).steps(checksums=True)] == [None, None]


def fail_to_stage_on(failing_rank: int, folder: Path) -> str:
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), keep_last=9)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state = make_state(2, rank=rank, ranks=ranks)
    if rank == failing_rank:
        for kind, tensor in state.fragments[0].tensors.items():
            state.fragments[0].tensors[kind] = tensor.double()
    store.save(2, state)
    with pytest.raises(CheckpointError) as caught:
        store.wait_staged()
    store.save(4, make_state(4, rank=rank, ranks=ranks))
    store.wait()
    return str(caught.value)


def test_a_copy_that_fails_on_one_rank_is_raised_on_all_before_the_update(tmp_path: Path) -> None:
    for message in run_ranks(2, fail_to_stage_on, 1, tmp_path):
        assert "rank 1: AssertionError: master.embedding.weight is torch.float64" in message
    assert [info.step for info in open_alone(tmp_path).steps(checksums=True)] == [4]


def die_while_saving(folder: Path, victim: int) -> None:
    """Save step 2 whole; one rank is killed by SIGKILL in the middle of step 4's data."""
    from pretrain.checkpoint import storage

    save_on_ranks(folder, 2)
    if dist.get_rank() == victim:
        original = storage.ChecksummedFile.write

        def write_then_die(file: storage.ChecksummedFile, data: object) -> int:
            count = original(file, data)
            if file.written_bytes > 2000:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        storage.ChecksummedFile.write = write_then_die  # type: ignore[assignment,method-assign]
    save_on_ranks(folder, 4)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_mid_save_leaves_the_step_before(
    victim: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, die_while_saving, tmp_path, victim, timeout_s=30)
    assert caught.value.exit_codes[victim] == -signal.SIGKILL
    with caplog.at_level(logging.WARNING):
        assert open_alone(tmp_path).latest() == tmp_path / "step_00000002"
    if (tmp_path / "step_00000004").exists():  # else the surviving rank 0 has removed it
        assert "step_00000004 is passed over: MANIFEST.json is gone" in caplog.text
    save_all(open_alone(tmp_path), 6)
    assert [info.step for info in open_alone(tmp_path).steps(checksums=True)] == [2, 6]


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    store = open_alone(tmp_path)
    for step in range(1, 6):
        store.save(step, make_state(step))
        assert len(list(tmp_path.glob("*/MANIFEST.json"))) >= step - 1
    store.wait()
    assert [info.problem for info in store.steps(checksums=True)] == [None] * 5


def test_steps_are_described(tmp_path: Path) -> None:
    save_all(open_alone(tmp_path), 1)
    (info,) = open_alone(tmp_path).steps()
    assert info.step == 1 and info.world_size == 1 and info.problem is None
    assert info.bytes == sum(f.stat().st_size for f in info.path.iterdir() if f.name != "MANIFEST.json")
    assert info.written_at is not None and abs(info.written_at.timestamp() - time.time()) < 60
    shutil.rmtree(info.path)
    assert open_alone(tmp_path).steps() == []
