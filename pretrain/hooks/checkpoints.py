"""Saving: every so many steps, at the end, when the run is asked to stop; and what is done when a save has failed."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Self, TypeVar

import torch.distributed as dist

from pretrain.errors import CheckpointError, NoRoomError, may_pass
from pretrain.hooks.base import Hook, Setup, due
from pretrain.signals import Matter

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run

logger = logging.getLogger(__name__)

RETRY_EVERY_S, RETRY_FOR_S = 10.0, 1800.0
"""How often a save that found no room is tried again, and for how long: as long as a launched run's verdict is."""


class CheckpointHook(Hook):
    """Comes after all hooks whose state it saves.

    How long a save held up training is known one step later, for its tensors are copied during that step.

    A save that fails beside the loop is known to all ranks two boundaries later. If what failed it may pass, such as a
    full disk, the run trains on and saves again and again, for a time; else it stops there.
    """

    name = "checkpoints"

    @classmethod
    def of(cls, setup: Setup) -> Self:
        return cls(setup.config.checkpoint.save_every_steps)

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._prepared = False
        self._saved_step: int | None = None
        self._unreported_step: int | None = None
        self._unrecorded_step: int | None = None
        self._failing_since: float | None = None
        self._try_at = math.inf

    def before_training(self, run: Run) -> None:
        self._saved_step = run.clock.step or None

    def after_step(self, run: Run, report: StepReport) -> None:
        if not self._prepared:
            self._prepared = True
            run.store.prepare()
        self._report(run)
        if self._unrecorded_step is not None and run.store.at_rest:
            self._record(run, self._unrecorded_step)
        if run.store.has_failed:
            run.stop.raise_matter(Matter.save_failed)
        # A save that was due may have come between, and have met the failure: asked again.
        if run.stop.is_agreed(Matter.save_failed) and any(_of_all(run, run.store.has_failed)):
            self._settle(run)
        if run.ranks.is_main and time.monotonic() >= self._try_at:
            self._try_at = math.inf
            run.stop.raise_matter(Matter.save_again)
        wanted = due(run.clock.step, self._every) or run.stop.is_agreed(Matter.save_again)
        if wanted and not run.clock.done:
            self._save(run)

    def after_training(self, run: Run) -> None:
        if run.clock.cursor is None:
            return  # asked to stop before there was a step
        if self._saved_step != run.clock.step:
            self._save(run)
        self._finish(run)
        while self._saved_step != run.clock.step:
            time.sleep(RETRY_EVERY_S)
            run.hooks.waiting(run)
            self._save(run)
            self._finish(run)

    def _finish(self, run: Run) -> None:
        """Wait for the save that was begun last."""
        run.store.wait_staged()
        self._report(run)
        self._settle(run)

    def _save(self, run: Run) -> None:
        run.finite.settle(run)
        self._settle(run)
        self._saved_step = self._unreported_step = self._unrecorded_step = run.clock.step
        try:
            run.store.save(run.clock.step, run.state())
        except CheckpointError as error:  # of a save that the loop waits for: all ranks have it
            self._failed(run, error)

    def _report(self, run: Run) -> None:
        """Write the figure of the save before, if there was one, under the step that it saved."""
        if self._unreported_step is not None:
            run.reporter.write(self._unreported_step, {"checkpoint/blocked_seconds": run.store.blocked_s})
            self._unreported_step = None

    def _record(self, run: Run, step: int) -> None:
        """Note in the ledger that a save is whole (rank 0 writes its manifest)."""
        run.record("save", step=step)
        self._unrecorded_step = self._failing_since = None
        self._try_at = math.inf

    def _settle(self, run: Run) -> None:
        """Wait for the save before, if it is not at rest; all ranks learn together what came of it. Collective."""
        found: CheckpointError | None = None
        try:
            run.store.wait()
        except CheckpointError as error:
            found = error
        mine = None if found is None else (str(found), may_pass(found))
        told = [one for one in _of_all(run, mine) if one is not None]
        if told:
            kind = NoRoomError if all(passing for _, passing in told) else CheckpointError
            self._failed(run, kind(told[0][0]))
        elif self._unrecorded_step is not None:
            self._record(run, self._unrecorded_step)

    def _failed(self, run: Run, error: CheckpointError) -> None:
        """The run goes on without this save, if there may be room for the next. On all ranks."""
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        again = may_pass(error) and now - self._failing_since < RETRY_FOR_S
        again = _of_all(run, again)[0]
        reason = str(error).splitlines()[0]
        run.record("save_failed", step=self._saved_step or run.clock.step, reason=reason, again=again)
        self._saved_step = self._unrecorded_step = None
        if not again:
            raise error
        self._try_at = now + RETRY_EVERY_S
        if run.ranks.is_main:
            left = (RETRY_FOR_S - (now - self._failing_since)) / 60
            logger.warning(
                "%s. The run goes on, and saves as soon as there is room: tried every %.0f s for %.0f more minutes",
                error,
                RETRY_EVERY_S,
                left,
            )


T = TypeVar("T")


def _of_all(run: Run, value: T) -> list[T]:
    """Every rank's value, by rank. Collective."""
    if run.ranks.world == 1:
        return [value]
    values: list[T] = [value] * run.ranks.world
    dist.all_gather_object(values, value, group=run.mesh.control)
    return values
