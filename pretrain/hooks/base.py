"""Hooks: what is optional in a run, with named moments and a state that is checkpointed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class Hook:
    """All ranks call every hook at the same moments, so a hook may use collectives."""

    name = "hook"

    def before_training(self, run: Run) -> None:
        """After a checkpoint, if any, was loaded; before the first step."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """The clock already counts the step."""

    def after_training(self, run: Run) -> None:
        """After the last step, or the one at which the run was asked to stop. Not after a crash."""

    def waiting(self, run: Run) -> None:
        """Now and then while the run waits for what is outside of it, such as room on a disk."""

    def close(self) -> None:
        """Always, also after an error. Must not use collectives."""

    def state(self) -> dict[str, Any]:
        """JSON values to keep in checkpoints."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


class Hooks:
    """Several hooks, called in order."""

    def __init__(self, hooks: list[Hook]) -> None:
        self._hooks = hooks

    def add(self, hook: Hook) -> None:
        """Call this one too, after the others."""
        self._hooks.append(hook)

    def before_training(self, run: Run) -> None:
        for hook in self._hooks:
            hook.before_training(run)

    def after_step(self, run: Run, report: StepReport) -> None:
        for hook in self._hooks:
            hook.after_step(run, report)

    def after_training(self, run: Run) -> None:
        for hook in self._hooks:
            hook.after_training(run)

    def waiting(self, run: Run) -> None:
        for hook in self._hooks:
            hook.waiting(run)

    def close(self) -> None:
        for hook in self._hooks:
            hook.close()

    def state(self) -> dict[str, Any]:
        return {hook.name: hook.state() for hook in self._hooks}

    def load_state(self, state: dict[str, Any]) -> None:
        for hook in self._hooks:
            if hook.name in state:
                hook.load_state(state[hook.name])


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
