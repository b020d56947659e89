"""Ranks, layouts and process groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pretrain.config import ParallelSection
from pretrain.config.world import data_parallel_size
from pretrain.errors import ConfigError, UserError
from pretrain.parallel.mesh import build_mesh
from pretrain.parallel.ranks import Ranks, choose_device, ranks_from_environment
from tests.harness import run_ranks


def test_ranks_come_from_torchrun_srun_or_nobody() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert ranks_from_environment(torchrun) == Ranks(5, 8, 1, "torchrun")
    srun = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "7",
    }
    assert ranks_from_environment(srun) == Ranks(3, 4, 1, "srun")
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert ranks_from_environment(batch_script) == Ranks(0, 1, 0, "alone")
    assert ranks_from_environment({}) == Ranks(0, 1, 0, "alone")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_asking_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UserError, match="run.device = cuda"):
        choose_device("cuda", Ranks(0, 1, 0, "alone"))
    assert choose_device("auto", Ranks(0, 1, 0, "alone")).type == "cpu"


def test_all_that_is_wrong_with_a_layout_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        data_parallel_size(ParallelSection(data=3), world=4, global_batch_rows=6)
    assert "2 problems" in str(caught.value)
    assert "parallel.data = 3: 4 processes leave 4" in str(caught.value)
    assert "data.global_batch_rows = 6: does not divide by 4" in str(caught.value)


def _sums() -> tuple[int, int, float, float]:
    mesh = build_mesh(ParallelSection())
    here = torch.tensor(float(dist.get_rank() + 1))
    data = here.clone()
    dist.all_reduce(data, group=mesh.data.group)
    control = here.clone()
    dist.all_reduce(control, group=mesh.control)
    assert mesh.mpu.get_model_parallel_world_size() == mesh.tensor.size == 1
    assert mesh.mpu.get_data_parallel_world_size() == mesh.data.size
    return mesh.data.rank, mesh.data.size, data.item(), control.item()


def test_the_groups_of_pure_data_parallelism() -> None:
    assert run_ranks(3, _sums) == [(rank, 3, 6.0, 6.0) for rank in range(3)]
