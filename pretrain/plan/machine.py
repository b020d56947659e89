"""The machine that a plan is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from pretrain.errors import ConfigError
from pretrain.hardware import ACCELERATORS, Accelerator, Interconnect

if TYPE_CHECKING:
    import torch

    from pretrain.config import Config

GIB = 1 << 30


def planned_machine(config: Config, gpu: str) -> Accelerator:
    """The accelerator of that name, in nodes as the config's `launch` section states them.

    Raises ConfigError for a device that is not in the table.
    """
    if gpu not in ACCELERATORS:
        raise ConfigError(f"--gpu {gpu}: not in the table; choose one of {', '.join(ACCELERATORS)}")
    launch = config.launch
    stated = Interconnect(launch.gpus_per_node or None, launch.ports, launch.port_gb_s, launch.node_gb_s)
    return ACCELERATORS[gpu].joined(stated)


def machine_at_hand(config: Config, device: torch.device, world: int) -> Accelerator:
    """What this process runs on.

    Raises ConfigError for a GPU of which the table says nothing.
    """
    if device.type == "cpu":
        return cpu_machine(world)
    from torch import cuda

    name = cuda.get_device_name(device)
    memory = cuda.get_device_properties(device).total_memory / GIB
    kinds = sorted((abs(one.memory_gib - memory), key) for key, one in ACCELERATORS.items() if _is(key, name))
    if not kinds:
        raise ConfigError(
            f"parallel.auto: nothing is known of {name!r}, by which to choose a layout; state one, or run on one of "
            f"{', '.join(ACCELERATORS)}"
        )
    return planned_machine(config, kinds[0][1])


def _is(key: str, name: str) -> bool:
    return key.partition("_")[0] in name.lower()


def cpu_machine(ranks: int) -> Accelerator:
    """A CPU core and its share of this machine's memory: figures that are good for comparing layouts alone."""
    memory = psutil.virtual_memory().total / GIB / max(1, ranks)
    return Accelerator(
        name="CPU core",
        generation="hopper",
        memory_gib=memory,
        peak_teraflops={"bf16": 0.02, "fp32": 0.05},
        memory_gb_s=8,
        node_gb_s=2,
        port_gb_s=1,
        host_gb_s=8,
        ports=1,
        gpus_per_node=max(1, ranks),
        multiprocessors=1,
    )
