"""Saving: every so many steps, at the end, and when the run is asked to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    def before_training(self, run: Run) -> None:
        self._saved_step = run.clock.step or None

    def after_step(self, run: Run, report: StepReport) -> None:
        self._report(run)
        if due(run.clock.step, self._every) and not run.clock.done:
            self._save(run)

    def after_training(self, run: Run) -> None:
        if self._saved_step != run.clock.step:
            self._save(run)
        run.store.wait_staged()
        self._report(run)
        run.store.wait()

    def _save(self, run: Run) -> None:
        run.store.save(run.clock.step, run.state())
        self._saved_step = self._unreported_step = run.clock.step
        run.record("save", step=run.clock.step)

    def _report(self, run: Run) -> None:
        """Write the figure of the save before, if there was one, under the step that it saved."""
        if self._unreported_step is not None:
            run.reporter.write(self._unreported_step, {"checkpoint/blocked_seconds": run.store.blocked_s})
            self._unreported_step = None
