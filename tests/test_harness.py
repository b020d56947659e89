"""The fork harness: results by rank, failures with their traceback, time limits, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import LONGEST_FIRST
from tests.harness import RanksFailed, run_ranks


def test_results_come_by_rank_also_after_threaded_work_here() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (torch.randn(600, 600) @ torch.randn(600, 600)).sum()

        def sum_of_ranks(offset: float) -> tuple[int, float]:
            value = torch.full((600, 600), offset + dist.get_rank())
            dist.all_reduce(value)
            return dist.get_rank(), (value @ torch.eye(600)).mean().item()

        assert run_ranks(3, sum_of_ranks, 1.0) == [(0, 6.0), (1, 6.0), (2, 6.0)]
    finally:
        torch.set_num_threads(threads)


def test_the_first_failing_rank_is_shown_and_the_others_do_not_hang() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("a clear cause")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 raised:(.|\n)*a clear cause"):
        run_ranks(2, fail)
    assert time.monotonic() - began < 30


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(RanksFailed, match="rank 0 died") as caught:
        run_ranks(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert caught.value.exit_codes == [-signal.SIGKILL]


def test_the_time_limit_ends_ranks_and_what_they_started(tmp_path: Path) -> None:
    def start_and_hang() -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    with pytest.raises(RanksFailed, match="did not end in time"):
        run_ranks(1, start_and_hang, timeout_s=2)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_the_files_that_go_first_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (Path(__file__).parent / name).is_file()] == []
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)
