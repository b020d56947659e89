"""What may change, and when, while a save copies the state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState
from pretrain.checkpoint.boxes import Boxes
from pretrain.checkpoint.staging import Stager, Views
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import is_equal, make_state
from tests.pretrain.checkpoint.stores import open_alone, save_all


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
