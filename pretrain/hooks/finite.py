"""One rule for steps whose gradient is not finite, whatever the engine, the ZeRO stage and the log steps are."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.hooks.base import Hook, Setup
from pretrain.records import is_count

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A step whose gradient norm is on its way to the host. `copied`: None where it is there already."""

    step: int
    rows: tuple[int, int]
    norm: Tensor
    copied: torch.cuda.Event | None


class FiniteHook(Hook):
    """Stops the run at a step whose gradient is not finite, or passes over up to `limit` of them in a run's life.

    No engine lets such a step change a weight, a moment or one of Adam's counters. The norm is copied to the host
    beside the next step and read when that one has been queued, so that the device never waits; `settle` reads it
    now. It is finite or not alike on all ranks: all of them act at the same boundary.

    Comes before all hooks that log or save: they call `settle`, and what they see is of finite steps.
    """

    name = "finite"

    @classmethod
    def of(cls, setup: Setup) -> Self:
        return cls(setup.config.optim.skip_non_finite_steps)

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: _Pending | None = None
        self.skipped = 0

    @property
    def may_skip(self) -> bool:
        return self._limit > 0

    def after_step(self, run: Run, report: StepReport) -> None:
        self.settle(run)
        assert run.clock.cursor is not None
        end, norm = run.clock.cursor.row, report.gradient_norm.detach()
        copied = None
        if norm.is_cuda:
            norm = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        rows = (end - run.config.data.global_batch_rows, end - 1)
        self._pending = _Pending(run.clock.step, rows, norm, copied)

    def after_training(self, run: Run) -> None:
        self.settle(run)

    def settle(self, run: Run) -> None:
        """Judge the last step, if that has not been done. Waits for the device if it is not through with it.

        Raises:
            UserError: on all ranks: the gradient is not finite, and no (more) such steps may be passed over.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        norm = float(pending.norm)
        if not math.isfinite(norm):
            self._act(run, pending.step, pending.rows, norm)

    def _act(self, run: Run, step: int, rows: tuple[int, int], norm: float) -> None:
        self.skipped += 1
        stops = self.skipped > self._limit
        action = "stop" if stops else "skip"
        facts = {"rows": list(rows), "gradient_norm": str(norm), "action": action, "skipped": self.skipped}
        run.record("not_finite", step=step, **facts)
        where = f"step {step} (rows {rows[0]} to {rows[1]}): the gradient norm is {norm}"
        if not stops:
            if run.ranks.is_main:
                logger.warning(
                    "%s; skipped, the %d. of %d that may be (optim.skip_non_finite_steps)",
                    where,
                    self.skipped,
                    self._limit,
                )
            return
        more = f", the {self.skipped}. such step of the run" if self._limit else ""
        raise UserError(
            f"{where}{more}: the run stops and saves nothing more; the steps under {run.folder.checkpoints} are from "
            "before. Lower optim.lr or optim.clip_norm, or raise optim.warmup_steps; optim.skip_non_finite_steps = "
            f"{self.skipped} would pass over it"
        )

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        if not is_count(state["skipped"]):
            raise ValueError(f"skipped is {state['skipped']!r}")
        self.skipped = state["skipped"]
