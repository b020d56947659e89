"""The store on several ranks: ranges cut anywhere, and one rank that fails."""

from __future__ import annotations

import logging
import os
import resource
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.checkpoint import CheckpointStore
from pretrain.errors import CheckpointError
from tests.harness import RanksFailed, run_ranks
from tests.pretrain.checkpoint.states import is_equal, make_state
from tests.pretrain.checkpoint.stores import flip_bit, open_alone, save_all


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
