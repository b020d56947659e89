"""What the preflight checks.

Each rank first checks what it can alone, and writes it down, so that a node that then hangs is known by its
silence. Then they check each other: a rendezvous, clocks, whether all see the same storage, the rate of an
all-reduce, and one step of the run's own model that is kept nowhere.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from launch.job import LaunchedRun
from launch.preflight_reports import (
    ALONE_STAGE,
    COMPARED_STAGE,
    LAST_STAGE,
    MEASURED_STAGE,
    MET_STAGE,
    TRIED_STAGE,
    Report,
)
from launch.settings import ClusterSettings, PreflightSettings
from pretrain.config import Config, load_resolved
from pretrain.errors import TransientError, UserError, may_pass
from pretrain.parallel.ranks import choose_device, ranks_from_environment, start_process_group
from pretrain.plan.memory import FP32_BYTES
from pretrain.plan.parameters import count_parameters, resolved
from pretrain.versions import library_versions

GEMM_SIZE = 8192
GEMM_SIZE_CPU = 512
REDUCE_BYTES = 256 << 20
REDUCE_BYTES_CPU = 4 << 20
CHECKPOINTS_TO_FIT = 2
BYTES_PER_PARAMETER = 3 * FP32_BYTES
"""Of a checkpoint: the master weight and Adam's two moments."""


def check(run: LaunchedRun, folder: Path, report: Report) -> None:
    """All stages on this rank; the report says what was found."""
    _all_stages(run, folder, report)
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_stages(run: LaunchedRun, folder: Path, report: Report) -> None:
    ranks = ranks_from_environment()
    config, settings = load_resolved(run.config), run.settings.preflight
    _alone(report, lambda: check_gpus_seen(config, run.settings))
    devices: list[torch.device] = []
    _alone_on_node(report, lambda: devices.append(choose_device(config.run.device, ranks)))
    if report.alone or report.problems:
        report.write(folder, ALONE_STAGE)
        return
    device = devices[0]
    if ranks.local_rank == 0:
        _alone(report, lambda: check_storage(run.run, folder), lambda: check_space(run.run, config))
    _alone(report, lambda: check_data(config))
    report.versions = library_versions()
    _alone_on_node(report, lambda: check_device(report, device, settings))
    report.write(folder, ALONE_STAGE)
    if report.problems or report.alone:
        return
    start_process_group(ranks, device, timeout_s=run.settings.preflight.seconds)
    report.write(folder, MET_STAGE)
    _together(report, folder, settings, device)
    if _tries_a_step(settings, device) and not report.problems:
        dry_step(report, config)
    if not report.problems and not report.everywhere:
        report.write(folder, LAST_STAGE)
    else:
        report.write(folder, TRIED_STAGE)
    dist.barrier()


def _tries_a_step(settings: PreflightSettings, device: torch.device) -> bool:
    """Without a word in the settings: on GPUs."""
    return device.type == "cuda" if settings.dry_step is None else settings.dry_step


def _alone(report: Report, *checks: Callable[[], None]) -> None:
    """What goes wrong here goes wrong on every node, or shows what is not mounted on this one."""
    for one in checks:
        try:
            one()
        except (UserError, ValueError, OSError) as error:
            report.alone.append(str(error))
            if may_pass(error):
                report.passing.append(str(error))


def _alone_on_node(report: Report, one: Callable[[], None]) -> None:
    try:
        one()
    except (RuntimeError, OSError, UserError) as error:
        report.problems.append(str(error).split("\n")[0])


def check_storage(run: Path, folder: Path) -> None:
    """Write, read back and rename in the run's folder, as a checkpoint does."""
    path = folder / f"storage.{platform.node()}"
    written = os.urandom(1 << 16)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(written)
    temporary.rename(path)
    if path.read_bytes() != written:
        raise OSError(f"{run}: what {platform.node()} wrote there reads back differently")


def check_space(run: Path, config: Config) -> None:
    """Room for two checkpoints. Raises TransientError naming both figures."""
    needed = CHECKPOINTS_TO_FIT * BYTES_PER_PARAMETER * sum(count_parameters(resolved(config)).values())
    free = shutil.disk_usage(run).free
    if free < needed:
        raise TransientError(
            f"{run}: {free / 1e9:.1f} GB are free, and {CHECKPOINTS_TO_FIT} checkpoints take {needed / 1e9:.1f} GB; "
            "make room, or set run.folder elsewhere"
        )


def check_data(config: Config) -> None:
    """Every dataset opens from this node."""
    from pretrain.run_data import open_run_data

    open_run_data(config)


def check_gpus_seen(config: Config, settings: ClusterSettings) -> None:
    """A node that shows no GPU would train on its CPUs. Raises UserError."""
    if config.run.device != "cpu" and settings.gpus_per_node > 0 and not torch.cuda.is_available():
        raise UserError(
            f"no GPU is seen, of {settings.gpus_per_node} per node; what does `nvidia-smi` say there?"
        )


def check_device(report: Report, device: torch.device, settings: PreflightSettings) -> None:
    """A matrix product on the device, right and fast enough. Raises RuntimeError."""
    on_gpu = device.type == "cuda"
    size, dtype = (GEMM_SIZE, torch.bfloat16) if on_gpu else (GEMM_SIZE_CPU, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    product = a @ a
    if not bool((product == size).all()):
        raise RuntimeError(f"{device}: a matrix product of ones is wrong")
    began, count = time.perf_counter(), 10 if on_gpu else 2
    for _ in range(count):
        product = a @ a
    if on_gpu:
        torch.cuda.synchronize(device)
    rate = 2 * size**3 * count / (time.perf_counter() - began) / 1e12
    report.figures["gemm_teraflops"] = rate
    least = settings.least_gemm_teraflops
    if on_gpu and least is not None and rate < least:
        raise RuntimeError(f"{device}: {rate:.0f} TFLOP/s in a bf16 matrix product, below {least:.0f}")


def _together(report: Report, folder: Path, settings: PreflightSettings, device: torch.device) -> None:
    """What only shows between nodes."""
    world = dist.get_world_size()
    dist.barrier()
    clocks: list[float] = [0.0] * world
    dist.all_gather_object(clocks, time.time())
    skew = abs(clocks[report.rank] - statistics.median(clocks))
    report.figures["clock_skew_seconds"] = skew
    if skew > settings.most_clock_skew_seconds:
        report.problems.append(f"its clock is {skew:.1f} s off the others'; is chronyd running?")
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, report.host)
    unseen = [host for host in dict.fromkeys(hosts) if not (folder / f"storage.{host}").is_file()]
    if unseen:
        report.everywhere.append(
            f"{folder}: {report.host} does not see what {', '.join(unseen)} wrote there; the run folder must be on "
            "storage that all nodes share: set run.folder"
        )
    report.write(folder, COMPARED_STAGE)
    report.figures["all_reduce_gigabytes_per_second"] = _reduce_rate(device, None)
    if len(set(hosts)) < world:
        own = _node_group(hosts, report.host)
        report.figures["all_reduce_in_node_gigabytes_per_second"] = _reduce_rate(device, own)
    report.write(folder, MEASURED_STAGE)


def _node_group(hosts: Sequence[str], own: str) -> dist.ProcessGroup:
    """The ranks of this node. Collective: every rank makes every node's group."""
    groups = {
        host: dist.new_group([rank for rank, name in enumerate(hosts) if name == host])
        for host in dict.fromkeys(hosts)
    }
    found: dist.ProcessGroup = groups[own]
    return found


def _reduce_rate(device: torch.device, group: dist.ProcessGroup | None) -> float:
    size = REDUCE_BYTES if device.type == "cuda" else REDUCE_BYTES_CPU
    buffer = torch.ones(size // 4, device=device)
    dist.all_reduce(buffer, group=group)  # the first one sets connections up
    began = time.perf_counter()
    dist.all_reduce(buffer, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return size / (time.perf_counter() - began) / 1e9


def dry_step(report: Report, config: Config) -> None:
    """Model, engine and one batch, forward, backward and update, at a learning rate of zero."""
    from data_pipelines.stream.stream import open_stream
    from pretrain.assembly import build_engine
    from pretrain.objectives import build_objective
    from pretrain.parallel.mesh import build_mesh
    from pretrain.run_data import open_run_data

    began = time.perf_counter()
    try:
        data = open_run_data(config)
        mesh = build_mesh(data.config.parallel)
        device = choose_device(config.run.device, ranks_from_environment())
        engine = build_engine(data.config, mesh, device)
        rows = config.data.global_batch_rows
        objective = build_objective(data.config, data.vocabulary)
        train = objective.rows(data.train)
        with open_stream(train, rows, mesh.data.rank, mesh.data.size, steps=1) as stream:
            engine.train_step(next(iter(stream)), objective, 0.0)
    except (RuntimeError, UserError, ValueError) as error:
        report.everywhere.append(f"one step of the model failed: {str(error).splitlines()[0]}")
    report.figures["dry_step_seconds"] = time.perf_counter() - began
