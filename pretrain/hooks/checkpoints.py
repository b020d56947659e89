"""Saving: every so many steps, at the end, and when the run is asked to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.hooks.base import Hook, due

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class CheckpointHook(Hook):
    """Comes after all hooks whose state it saves."""

    name = "checkpoints"

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._saved_step: int | None = None

    def before_training(self, run: Run) -> None:
        self._saved_step = run.clock.step or None

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run.clock.step, self._every) and not run.clock.done:
            self._save(run)

    def after_training(self, run: Run) -> None:
        if self._saved_step != run.clock.step:
            self._save(run)
        run.store.wait()

    def _save(self, run: Run) -> None:
        blocked_s = run.store.save(run.clock.step, run.state())
        self._saved_step = run.clock.step
        run.reporter.write(run.clock.step, {"checkpoint/blocked_seconds": blocked_s})
        run.record("save", step=run.clock.step, blocked_s=round(blocked_s, 4))
