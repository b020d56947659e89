"""What the accelerators that Triptych runs on can do, from their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    name: str
    memory_gib: float
    peak_teraflops: Mapping[str, float]
    """Dense matrix products, by precision.dtype, in 10^12 operations per second."""
    memory_gb_s: float
    """From its own memory, in 10^9 bytes per second."""
    node_gb_s: float
    """To the other GPUs of its node, in one direction: NVLink."""
    network_gb_s: float
    """To other nodes, in one direction: one InfiniBand port per GPU."""
    host_gb_s: float
    """From host memory: a GPU's share of its node's."""
    gpus_per_node: int = 8


ACCELERATORS: Mapping[str, Accelerator] = {
    "h100": Accelerator("NVIDIA H100 SXM", 80, {"bf16": 989, "fp32": 494}, 3350, 450, 50, 76),
    "h200": Accelerator("NVIDIA H200 SXM", 141, {"bf16": 989, "fp32": 494}, 4800, 450, 50, 76),
    "a100": Accelerator("NVIDIA A100 SXM", 80, {"bf16": 312, "fp32": 156}, 2039, 300, 25, 51),
}
"""fp32 products run as TF32 on these parts. Networks are those of the maker's own clusters: 400 Gb/s per GPU, and
200 Gb/s for the A100; host memory is that of two processors with eight channels each (DDR5-4800, DDR4-3200)."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations per second of the device that CUDA calls `device_name`; None where it is not in the table."""
    for key, accelerator in ACCELERATORS.items():
        if key in device_name.lower():
            return accelerator.peak_teraflops[dtype] * 1e12
    return None
