"""What the accelerators that Triptych runs on can do, from their makers' data sheets, and how they are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Accelerator:
    name: str
    generation: Literal["hopper", "ampere"]
    """Of its matrix units: what is known of kernels is known by it."""
    memory_gib: float
    peak_teraflops: Mapping[str, float]
    """Dense matrix products, by precision.dtype, in 10^12 operations per second."""
    memory_gb_s: float
    """From its own memory, in 10^9 bytes per second."""
    node_gb_s: float
    """To the other GPUs of its node, in one direction: NVLink."""
    port_gb_s: float
    """A network port, in one direction."""
    host_gb_s: float
    """From host memory: a GPU's share of its node's."""
    ports: int = 8
    """Network ports of a node."""
    gpus_per_node: int = 8
    has_switch: bool = True
    """Whether NVLink goes through a switch, so that any two GPUs of a node have all of it. On boards of four without
    one each pair has a third."""
    sustained: float = 1.0
    """Of the clock at which the peak is stated, under full load: less where the power is capped."""
    multiprocessors: int = 132

    def joined(self, interconnect: Interconnect) -> Accelerator:
        """In nodes like these. What is not stated is the maker's: a port per GPU, and a switch where there are more
        than four."""
        stated = {key: value for key, value in vars(interconnect).items() if value is not None}
        if per_node := stated.get("gpus_per_node"):
            stated = {"ports": per_node, "has_switch": per_node > 4} | stated
        return replace(self, **stated)


@dataclass(frozen=True)
class Interconnect:
    """How a cluster's nodes are joined, where it is not as in its maker's own: None is the table's."""

    gpus_per_node: int | None = None
    ports: int | None = None
    port_gb_s: float | None = None
    node_gb_s: float | None = None
    has_switch: bool | None = None


HOPPER, AMPERE = {"bf16": 989.0, "fp32": 494.0}, {"bf16": 312.0, "fp32": 156.0}
ACCELERATORS: Mapping[str, Accelerator] = {
    "h100": Accelerator("NVIDIA H100 SXM", "hopper", 80, HOPPER, 3350, 450, 50, 76),
    "h200": Accelerator("NVIDIA H200 SXM", "hopper", 141, HOPPER, 4800, 450, 50, 76),
    "a100": Accelerator(
        "NVIDIA A100 SXM 80 GB", "ampere", 80, AMPERE, 2039, 300, 25, 51, multiprocessors=108
    ),
    "a100_40": Accelerator(
        "NVIDIA A100 SXM 40 GB", "ampere", 40, AMPERE, 1555, 300, 25, 51, multiprocessors=108
    ),
}
"""fp32 products run as TF32 on these parts. Networks are those of the maker's own clusters: a port per GPU, of 400
Gb/s, and of 200 Gb/s for the A100; host memory is that of two processors with eight channels each (DDR5-4800,
DDR4-3200)."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations per second of the device that CUDA calls `device_name`; None where it is not in the table."""
    for key, accelerator in ACCELERATORS.items():
        if key in device_name.lower():
            return accelerator.peak_teraflops[dtype] * 1e12
    return None
