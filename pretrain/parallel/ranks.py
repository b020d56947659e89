"""Who this process is among the run's processes, and how they find each other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.attempts import own_attempt
from pretrain.errors import TransientError, UserError

SCONTROL_TIMEOUT_S = 20


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world`, the `local_rank`-th on its node."""

    rank: int
    world: int
    local_rank: int
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
        return Ranks(rank, world, local, "torchrun")
    # The batch script itself has SLURM_PROCID=0 too; only a step that srun started has a task count of its own.
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, world = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        return Ranks(rank, world, int(environment.get("SLURM_LOCALID", 0)), "srun")
    return Ranks(0, 1, 0, "alone")


def choose_device(wanted: str, ranks: Ranks) -> torch.device:
    """`auto` takes this rank's GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda: this machine shows no CUDA device; use run.device=auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and ranks.started_by == "srun":
        return torch.device(
            "cuda", 0
        )  # --gpus-per-task or --gpu-bind: each process is shown its own GPU alone
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {ranks.local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; "
            "start as many processes per node as it has GPUs"
        )
    return torch.device("cuda", ranks.local_rank)


def start_process_group(ranks: Ranks, device: torch.device, timeout_s: float = 1800) -> None:
    """Bring up torch.distributed: NCCL on GPUs, gloo on the CPU. A process that runs alone needs no port."""
    # DeepSpeed asks the environment, whoever started us.
    os.environ["LOCAL_RANK"] = str(ranks.local_rank if device.index is None else device.index)
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if ranks.started_by == "alone":
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if ranks.started_by == "srun":
        _rendezvous_from_slurm()
    dist.init_process_group(
        backend, init_method="env://", rank=ranks.rank, world_size=ranks.world, timeout=timeout
    )


def _rendezvous_from_slurm() -> None:
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodes],
                capture_output=True,
                text=True,
                timeout=SCONTROL_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            kind = UserError if isinstance(error, OSError) else TransientError
            raise kind(
                f"the first node of {nodes} is not known ({error}); export MASTER_ADDR in the batch script"
            ) from None
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(meeting_port(os.environ)))


def meeting_port(environment: Mapping[str, str]) -> int:
    """The same on all ranks of a step, and most likely another one for another step on a node and for another attempt,
    since somebody may listen there. Below the range from which the system takes ports for outgoing connections."""
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job * 31 + step + 7 * (own_attempt(environment) or 0)) % 12000
