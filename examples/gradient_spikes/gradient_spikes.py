"""Spikes of the gradient's norm, a hook of one's own: how often a step's norm is far above what it was lately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from pretrain.config.own import HookSection
from pretrain.hooks.base import Hook, due

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class Spikes(HookSection):
    """What `monitor.hooks` may say of it."""

    hook: ClassVar[str] = "gradient_spikes:GradientSpikes"

    every: int = Field(default=10, ge=1, le=1_000_000)
    """Steps between two records."""
    above: float = Field(default=3.0, gt=1, le=1e6)
    """A spike is a norm of so many times the running mean."""
    decay: float = Field(default=0.98, ge=0, lt=1)
    """Of the running mean, per step."""


class GradientSpikes(Hook):
    """Its figures stay on the device between two records, so that no step waits for them; a checkpoint has them."""

    scalars: ClassVar[Mapping[str, str]] = {
        "spikes/worst": "Greatest gradient norm since the last record, over the mean of the steps before it.",
        "spikes/count": "Steps of the run whose gradient norm was above so many times that mean.",
    }

    def __init__(self, settings: Spikes) -> None:
        self._settings = settings
        self._kept = [0.0, 0.0, 0.0]  # mean, worst, count

    def before_training(self, run: Run) -> None:
        self._mean, self._worst, self._count = torch.tensor(self._kept, device=run.device).unbind()

    def after_step(self, run: Run, report: StepReport) -> None:
        norm = report.gradient_norm.detach().float()
        norm = torch.where(torch.isfinite(norm), norm, self._mean)  # of a step that is skipped
        mean = torch.where(self._mean > 0, self._mean, norm)
        self._worst = torch.maximum(self._worst, norm / mean)
        self._count = self._count + (norm > self._settings.above * mean)
        self._mean = torch.lerp(norm, mean, self._settings.decay)
        if due(run.clock.step, self._settings.every):
            record = {"spikes/worst": float(self._worst), "spikes/count": int(self._count)}
            run.reporter.write(run.clock.step, record)
            self._worst = torch.zeros_like(self._worst)

    def state(self) -> dict[str, Any]:
        return {"mean_worst_count": [float(one) for one in (self._mean, self._worst, self._count)]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._kept = [float(one) for one in state["mean_worst_count"]]
