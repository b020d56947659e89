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


ACCELERATORS: Mapping[str, Accelerator] = {
    "h100": Accelerator("NVIDIA H100 SXM", 80, {"bf16": 989, "fp32": 494}),
    "h200": Accelerator("NVIDIA H200 SXM", 141, {"bf16": 989, "fp32": 494}),
    "a100": Accelerator("NVIDIA A100 SXM", 80, {"bf16": 312, "fp32": 156}),
}
"""fp32 products run as TF32 on these parts."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations per second of the device that CUDA calls `device_name`; None where it is not in the table."""
    for key, accelerator in ACCELERATORS.items():
        if key in device_name.lower():
            return accelerator.peak_teraflops[dtype] * 1e12
    return None
