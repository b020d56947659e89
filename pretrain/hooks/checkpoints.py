"""Saving: every so many steps, at the end, and when the run is asked to stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.hooks.base import Hook, due

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class CheckpointHook(Hook):
    """Comes after all hooks whose state it saves.

    How long a save held up training is known one step later, for its tensors are copied during that step.
    """

    name = "checkpoints"

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._saved_step: int | None = None
        self._unreported_step: int | None = None
        self._unrecorded_step: int | None = None

    def before_training(self, run: Run) -> None:
        self._saved_step = run.clock.step or None
        self._last_report: StepReport | None = None

    def after_step(self, run: Run, report: StepReport) -> None:
        self._last_report = report
        self._report(run)
        if self._unrecorded_step is not None and run.store.at_rest:
            self._record(run)
        if due(run.clock.step, self._every) and not run.clock.done:
            self._save(run)

    def after_training(self, run: Run) -> None:
        if self._saved_step != run.clock.step:
            self._save(run)
        run.store.wait_staged()
        self._report(run)
        self._record(run)

    def _save(self, run: Run) -> None:
        if self._last_report is not None:
            refuse_non_finite(self._last_report, run)
        self._record(run)
        run.store.save(run.clock.step, run.state())
        self._saved_step = self._unreported_step = self._unrecorded_step = run.clock.step

    def _report(self, run: Run) -> None:
        """Write the figure of the save before, if there was one, under the step that it saved."""
        if self._unreported_step is not None:
            run.reporter.write(self._unreported_step, {"checkpoint/blocked_seconds": run.store.blocked_s})
            self._unreported_step = None

    def _record(self, run: Run) -> None:
        """Wait for the save before, and note it in the ledger now that it is whole (rank 0 writes its manifest)."""
        run.store.wait()
        if self._unrecorded_step is not None:
            run.record("save", step=self._unrecorded_step)
            self._unrecorded_step = None


def refuse_non_finite(report: StepReport, run: Run) -> None:
    """Weights that a NaN went through must not take the place of good ones. Raises UserError on all ranks.

    The gradient norm is the same on all ranks, and no loss is NaN without it.
    """
    norm = float(report.gradient_norm)
    if not math.isfinite(norm):
        raise UserError(
            f"the gradient norm is {norm} in step {run.clock.step}: the run stops and saves nothing more; the steps "
            f"under {run.folder.checkpoints} are from before. Lower optim.lr or optim.clip_norm, or raise "
            "optim.warmup_steps"
        )
