"""The store in one process: what it keeps, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from pretrain.checkpoint import CheckpointStore, Placement
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import SHAPES, is_equal, make_state
from tests.pretrain.checkpoint.stores import open_alone, save_all


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
