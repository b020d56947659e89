"""How a launched rank leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.rank import leave_early_on_signals, record_exit
from pretrain.attempts import ATTEMPT_VARIABLE, AttemptFolder, RankExit
from pretrain.signals import StopRequest
from tests.harness import run_ranks


def test_what_cannot_be_written_does_not_keep_a_rank_from_leaving(tmp_path: Path) -> None:
    record_exit(AttemptFolder(Path("/dev/full/attempt")), RankExit(0, "node1", 1, "why", None))
    code = "from launch.rank import leave; print('a last line'); leave(75)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=full, stderr=full, timeout=60
        )
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_after_the_run_tells_no_other_story(tmp_path: Path, number: signal.Signals) -> None:
    folder = AttemptFolder(tmp_path / "attempt")
    folder.path.mkdir()

    def rank() -> None:
        os.environ[ATTEMPT_VARIABLE] = "1"
        leave_early_on_signals(folder, 0)
        assert dist.group.WORLD is not None
        with StopRequest(dist.group.WORLD) as stop:
            assert not stop.agreed()
        os.kill(os.getpid(), number)

    run_ranks(1, rank)
    assert folder.exits() == []


def test_a_signal_before_the_run_ends_the_rank_and_says_which(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from launch.rank import leave_early_on_signals; "
        "from pretrain.attempts import AttemptFolder; leave_early_on_signals(AttemptFolder(Path(sys.argv[1])), 3); "
        "os.kill(os.getpid(), signal.SIGUSR2); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stdout
    (found,) = AttemptFolder(tmp_path).exits()
    assert (found.rank, found.code) == (3, 128 + signal.SIGUSR2) and "before the first step" in found.reason
