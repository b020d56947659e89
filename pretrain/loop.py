"""The training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.run import Run


def train(run: Run) -> None:
    """Train until the clock is done or somebody asks the run to stop. Either way the last step is saved."""
    run.hooks.before_training(run)
    for batch in run.stream:
        report = run.engine.train_step(batch, run.objective, run.lr_factor(run.clock.step))
        run.clock.advance(batch.cursor, report.tokens)
        run.hooks.after_step(run, report)
        if run.clock.done or run.stop.agreed():
            break
    run.hooks.after_training(run)
