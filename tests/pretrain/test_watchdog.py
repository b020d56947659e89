"""The watchdog ends a hung rank, whatever the state of the storage. Whom it blames, the drills on Slurm show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pretrain.attempts import AttemptFolder
from pretrain.exit_codes import EXIT_NODE_FAULT
from pretrain.hooks.watchdog import read_heartbeats

STARTED = """
import shutil, sys, time
from pathlib import Path
from types import SimpleNamespace
from pretrain.attempts import AttemptFolder
from pretrain.hooks.watchdog import WatchdogHook

folder = AttemptFolder(Path(sys.argv[1]) / "attempt")
run = SimpleNamespace(ranks=SimpleNamespace(rank=0), clock=SimpleNamespace(step=0))
WatchdogHook(float(sys.argv[2]), folder).before_training(run)
"""
HUNG = f"""{STARTED}
shutil.rmtree(folder.path)
folder.path.touch()  # nothing can be written there any more
time.sleep(60)
"""


def test_a_hung_rank_ends_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG, str(tmp_path), "1"], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_NODE_FAULT, done.stderr
    assert "no heartbeat was written" in done.stderr


def test_a_rank_is_known_from_its_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTED, str(tmp_path), "1000"]
    subprocess.run(command, check=True, timeout=50)
    assert [beat.rank for beat in read_heartbeats(AttemptFolder(tmp_path / "attempt"))] == [0]
