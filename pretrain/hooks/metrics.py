"""Loss, speed and memory, gathered on the device and read at log steps only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from pretrain.hardware import peak_flops
from pretrain.hooks.base import Hook, due
from pretrain.monitoring import Record

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run

GIB = 1 << 30


class MetricsHook(Hook):
    name = "metrics"

    def __init__(self, every: int, flops_per_token: float) -> None:
        self._every = every
        self._flops_per_token = flops_per_token
        self._process = psutil.Process()

    def before_training(self, run: Run) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        self._peak = None
        if run.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(run.device), run.config.precision.dtype)
        self._begin(run)

    def _begin(self, run: Run) -> None:
        self._sums.zero_()
        self._steps = 0
        self._tokens = 0
        self._since = time.perf_counter()
        _ = run.stream.wait_seconds  # reading it starts it again from 0

    def after_step(self, run: Run, report: StepReport) -> None:
        # The weight is the whole step's on every rank; the loss is this rank's part.
        self._sums[0] += report.loss_sum
        self._sums[1] += report.weight
        self._steps += 1
        self._tokens += report.tokens
        if due(run.clock.step, self._every) or run.clock.done:
            record = self._record(run, report)
            run.reporter.write(run.clock.step, record)
            self._begin(run)

    def _record(self, run: Run, report: StepReport) -> Record:
        loss_sum = self._sums[:1].clone()
        if run.mesh.data.size > 1:
            dist.all_reduce(loss_sum, group=run.mesh.data.group)
        loss = loss_sum.item() / self._sums[1].item()  # the only moment at which the host waits for the device
        seconds = time.perf_counter() - self._since
        speed = self._tokens / seconds
        flops = speed * self._flops_per_token / dist.get_world_size()
        record: Record = {
            "loss/train": loss,
            "optim/learning_rate": run.config.optim.lr * run.lr_factor(run.clock.step - 1),
            "optim/gradient_norm": report.gradient_norm.item(),
            "speed/tokens_per_second": speed,
            "speed/step_seconds": seconds / self._steps,
            "speed/data_wait_share": run.stream.wait_seconds / seconds,
            "speed/teraflops_per_rank": flops / 1e12,
            "memory/resident_gib": self._process.memory_info().rss / GIB,
            "progress/tokens": run.clock.tokens / 1e6,
        }
        if self._peak:
            record["speed/mfu"] = flops / self._peak
        if run.device.type == "cuda":
            record["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(run.device) / GIB
            torch.cuda.reset_peak_memory_stats(run.device)
        return record
