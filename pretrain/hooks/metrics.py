"""Loss, speed and memory, gathered on the device and read at log steps only."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Self

import psutil
import torch
import torch.distributed as dist

from models import families
from pretrain.engine.base import means
from pretrain.hardware import peak_flops
from pretrain.hooks.base import Hook, Setup, due
from pretrain.json_text import number_of
from pretrain.monitoring import Record

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run

GIB = 1 << 30


class MetricsHook(Hook):
    """Its state holds the sums since the last log, so that a run that stops between two logs still logs the same."""

    name = "metrics"

    @classmethod
    def of(cls, setup: Setup) -> Self:
        config = setup.config
        flops = families[config.model.family].flops_per_token(config.model, config.data.sequence_length)
        return cls(config.monitor.log_every_steps, flops)

    def __init__(self, every: int, flops_per_token: float) -> None:
        self._every = every
        self._flops_per_token = flops_per_token
        self._process = psutil.Process()
        self._carried = (0.0, 0.0)
        self._carried_parts: list[list[float]] = []

    def before_training(self, run: Run) -> None:
        self._run = run
        self._sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        self._parts = torch.zeros((len(run.objective.parts), 2), dtype=torch.float64, device=run.device)
        self._peak = None
        if run.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(run.device), run.config.precision.dtype)
        self._begin(run)
        loss, weight = self._carried
        # The loss is a rank's part, so one rank takes what was summed before; the weight is the whole step's.
        self._sums += torch.tensor(
            [loss if run.mesh.contributors.rank == 0 else 0.0, weight], device=run.device
        )
        if run.mesh.contributors.rank == 0 and self._carried_parts:
            self._parts += torch.tensor(self._carried_parts, dtype=torch.float64, device=run.device)

    def _begin(self, run: Run) -> None:
        self._sums.zero_()
        self._parts.zero_()
        self._steps = 0
        self._tokens = 0
        self._since = time.perf_counter()
        run.stream.take_wait_seconds()

    def after_step(self, run: Run, report: StepReport) -> None:
        # A step that is skipped trains nothing, and what is not finite would spoil the sums.
        counts = torch.isfinite(report.gradient_norm)
        self._sums[0] += torch.where(counts, report.loss_sum, 0.0)
        self._sums[1] += torch.where(counts, report.weight, 0.0)
        self._parts += torch.where(counts, report.parts, 0.0)
        self._steps += 1
        self._tokens += report.tokens
        if due(run.clock.step, self._every) or run.clock.done:
            run.finite.settle(run)
            run.reporter.write(run.clock.step, self._record(run, report))
            self._begin(run)

    def state(self) -> dict[str, Any]:
        loss, weight = self._reduced()
        return {"loss_sum": loss, "weight": weight, "parts": self._reduced_parts().tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        sums = (number_of(state["loss_sum"]), number_of(state["weight"]))
        parts = state.get("parts", [])  # checkpoints before there were parts have none
        if not all(isinstance(number, int | float) for pair in (sums, *parts) for number in pair):
            raise ValueError(f"sums that are no numbers: {sums}, {parts}"[:80])
        self._carried, self._carried_parts = sums, parts

    def _reduced(self) -> tuple[float, float]:
        """Loss over all ranks and weight, since the last log. Collective; the host waits for the device."""
        loss = self._sums[:1].clone()
        if self._run.mesh.contributors.size > 1:
            dist.all_reduce(loss, group=self._run.mesh.contributors.group)
        return loss.item(), self._sums[1].item()

    def _reduced_parts(self) -> torch.Tensor:
        """The objective's parts over all ranks, since the last log. Collective."""
        parts = self._parts.clone()
        if self._run.mesh.contributors.size > 1 and len(parts):
            dist.all_reduce(parts, group=self._run.mesh.contributors.group)
        return parts

    def _record(self, run: Run, report: StepReport) -> Record:
        loss_sum, weight = self._reduced()
        seconds = time.perf_counter() - self._since
        speed = self._tokens / seconds
        flops = speed * self._flops_per_token / dist.get_world_size()
        record: Record = {
            "loss/train": loss_sum / weight if weight else math.nan,
            **means(run.objective.parts, self._reduced_parts()),
            "optim/learning_rate": run.engine.scaled.optim.lr * run.lr_factor(run.clock.step - 1),
            "optim/gradient_norm": report.gradient_norm.item(),
            "speed/tokens_per_second": speed,
            "speed/step_seconds": seconds / self._steps,
            "speed/data_wait_share": run.stream.take_wait_seconds() / seconds,
            "speed/teraflops_per_rank": flops / 1e12,
            "memory/resident_gib": self._process.memory_info().rss / GIB,
            "progress/tokens": run.clock.tokens / 1e6,
        }
        if run.finite.may_skip:
            record["optim/skipped_steps"] = run.finite.skipped
        if self._peak:
            record["speed/mfu"] = flops / self._peak
        if run.device.type == "cuda":
            record["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(run.device) / GIB
            torch.cuda.reset_peak_memory_stats(run.device)
        return record
