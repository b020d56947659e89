"""Who this process is among the run's processes, and how they find each other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.errors import UserError

SCONTROL_TIMEOUT_S = 20


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world`, the `local_rank`-th of `local_world` on its node."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    started_by: str
    """torchrun, srun or alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Ranks as torchrun or srun started them; a single process otherwise."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", 0))
        return Ranks(rank, world, local, int(environment.get("LOCAL_WORLD_SIZE", world)), "torchrun")
    # The batch script itself has SLURM_PROCID=0 too; only a step that srun started has a task count of its own.
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, world = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        nodes = max(1, int(environment.get("SLURM_STEP_NUM_NODES", 1)))
        return Ranks(rank, world, int(environment.get("SLURM_LOCALID", 0)), max(1, world // nodes), "srun")
    return Ranks(0, 1, 0, 1, "alone")


def choose_device(wanted: str, ranks: Ranks) -> torch.device:
    """`auto` takes this rank's GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda: this machine shows no CUDA device; use run.device=auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {ranks.local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; "
            "start as many processes per node as it has GPUs"
        )
    return torch.device("cuda", ranks.local_rank)


def start_process_group(ranks: Ranks, device: torch.device, timeout_s: float = 1800) -> None:
    """Bring up torch.distributed: NCCL on GPUs, gloo on the CPU. A process that runs alone needs no port."""
    # DeepSpeed asks the environment, whoever started us.
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if ranks.started_by == "alone":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if ranks.started_by == "srun":
        _rendezvous_from_slurm()
    dist.init_process_group(backend, init_method="env://", rank=ranks.rank, world_size=ranks.world, timeout=timeout)


def _rendezvous_from_slurm() -> None:
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(
                f"the first node of {nodes} is not known ({error}); export MASTER_ADDR in the batch script"
            ) from None
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
    # Every rank of a job derives the same port, and two jobs on a node most likely different ones.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
