"""Measured collectives, beside what the planner says of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace

from benchmarks.published.rows import COLLECTIVES
from pretrain.hardware import ACCELERATORS
from pretrain.plan.constants import Constants
from pretrain.plan.network import Group, seconds

KINDS = {"all_reduce": "allreduce", "all_gather": "allgather", "reduce_scatter": "reduce_scatter"}
PER_NODE = 8


@dataclass(frozen=True)
class Collective:
    collective: str
    gpu: str
    gpus: int
    nodes: int
    nic_gb_s: float
    size_bytes: float
    busbw_gb_s: float


def read_collectives() -> list[Collective]:
    """Those of GPUs in the table and of a known size, without reduction in the switch, which no plan counts on."""
    with COLLECTIVES.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        Collective(
            line["collective"],
            line["gpu"],
            int(line["gpus"]),
            int(line["nodes"]),
            float(line["nic_gb_s_per_gpu"]),
            float(line["size_bytes"]),
            float(line["busbw_gb_s"]),
        )
        for line in lines
        if line["gpu"] in ACCELERATORS and line["size_bytes"] and line["algorithm"] != "NVLS"
    ]


def predicted_bandwidth(one: Collective, constants: Constants) -> float:
    """Bus bandwidth in GB/s, as nccl-tests defines it."""
    accelerator = replace(ACCELERATORS[one.gpu], port_gb_s=one.nic_gb_s)
    taken = seconds(KINDS[one.collective], one.size_bytes, Group(one.gpus), accelerator, constants)
    twice = 2 if one.collective == "all_reduce" else 1
    return twice * (one.gpus - 1) / one.gpus * one.size_bytes / taken / 1e9
