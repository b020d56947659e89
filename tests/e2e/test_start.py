"""What a start does not import: each of these costs a CPU's second or two, in every command or on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.training import environment, write_config

SUBMISSION = """
import sys
from pathlib import Path
from launch.settings import ClusterSettings
from launch.batch_script import script
from launch.request import Request
from launch.submission_checks import check_data, check_shape
from launch.sweep import sweep_configs
configs = sweep_configs(sys.argv[1], [], [])
request = Request("tiny", configs, ClusterSettings(gpus_per_node=0, tasks_per_node=2), nodes=1)
check_shape(request)
check_data(request)
assert "srun" in script(request)
"""
PREFLIGHT = "import launch.preflight_checks"
FIRST_STEPS = """
import sys
from pretrain.checkpoint import CheckpointStore
from pretrain.commands.train import run_training

class Saving(BaseException):
    pass

def save(*_):
    raise Saving

CheckpointStore.prepare = save  # called once the first step is done
try:
    run_training(sys.argv[1], ["parallel.zero=" + sys.argv[2]], print_config=False, quiet=True)
except Saving:
    pass
else:
    raise AssertionError("no save came")
"""


def imported(code: str, *arguments: str) -> set[str]:
    """The modules that a new process has after the code."""
    told = code + "\nprint('\\n' + '\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + told, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_launch_needs_no_torch(tmp_path: Path, corpus: Path) -> None:
    found = imported(SUBMISSION, str(write_config(tmp_path, corpus)))
    assert "submitit" in found and "torch" not in found


def test_the_preflight_needs_torch_alone() -> None:
    found = imported(PREFLIGHT)
    assert "torch" in found
    assert not found & {"deepspeed", "megatron", "sympy", "torch._dynamo", "torch.distributed.checkpoint"}


def test_the_first_steps_need_the_engine_alone(tmp_path: Path, corpus: Path) -> None:
    """No compiler, no megatron where only data are shared, nothing of a checkpoint."""
    found = imported(FIRST_STEPS, str(write_config(tmp_path, corpus)), "1")
    assert "deepspeed" in found
    assert not found & {"megatron", "sympy", "torch._dynamo", "torch.distributed.checkpoint"}
