"""What a cell notes of its solutions, on the device, for whoever wants to log it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.newton_rnn import Report

FIGURES = ("residual_max", "iterations", "jacobian_norm", "residual_mean", "acted", "clip_saturation")
MAXIMA = 3
"""So many of the figures are maxima over the forward passes; the others are means."""


@dataclass
class Telemetry:
    """Figures of the training passes since `take`, without a wait for the device.

    A pass that activation checkpointing repeats counts twice, which changes neither maxima nor means.
    """

    maxima: Tensor | None = None
    sums: Tensor | None = None
    calls: int = 0

    def add(self, report: Report, saturation: Tensor) -> None:
        """Note one solution, and the share of recurrent weights at the bound."""
        maxima = torch.stack((report.residual_max, report.iterations, report.jacobian_norm)).float()
        sums = torch.stack((report.residual_mean, report.acted, saturation)).float()
        self.maxima = maxima if self.maxima is None else torch.maximum(self.maxima, maxima)
        self.sums = sums if self.sums is None else self.sums + sums
        self.calls += 1

    def peek(self) -> Tensor:
        """(6,) the figures in the order of FIGURES: greatest residual, most iterations and greatest Jacobian
        norm of all passes, mean residual, share of passes in which the policy acted, mean clip saturation."""
        if self.maxima is None or self.sums is None:
            return torch.zeros(len(FIGURES))
        return torch.cat((self.maxima, self.sums / self.calls))

    def take(self) -> Tensor:
        """As `peek`, and begin anew."""
        figures = self.peek()
        self.maxima, self.sums, self.calls = None, None, 0
        return figures
