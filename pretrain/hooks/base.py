"""Hooks: what is optional in a run, with named moments and a state that is checkpointed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.engine.base import StepReport
    from pretrain.run import Run
    from pretrain.run_data import RunData
    from pretrain.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a run's hooks are made from. The data have filled the model's open settings in."""

    config: Config
    data: RunData
    folder: RunFolder


class Hook:
    """All ranks call every hook at the same moments, so a hook may use collectives.

    One from outside is made with its settings (`pretrain.config.own.HookSection`), and is called by the name that the
    config gives it. It says in `scalars` what those mean that it writes and that nobody else does.

    name: under which its state is in a checkpoint.
    """

    name = "hook"
    scalars: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        """The run's; None if it needs none. For the project's own, which `pretrain.hooks.table` lists."""
        raise NotImplementedError(f"{cls.__name__} is made with its settings")

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


H = TypeVar("H", bound=Hook)


class Hooks:
    """Several hooks, called in order."""

    def __init__(self, hooks: list[Hook]) -> None:
        self._hooks = hooks

    def add(self, hook: Hook) -> None:
        """Call this one too, after the others."""
        self._hooks.append(hook)

    def one(self, kind: type[H]) -> H:
        """The one of this class."""
        (found,) = (hook for hook in self._hooks if isinstance(hook, kind))
        return found

    @property
    def scalars(self) -> dict[str, str]:
        """What hooks say of scalars that are theirs alone."""
        return {name: text for hook in self._hooks for name, text in hook.scalars.items()}

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
        """What a save kept of each hook that is here. Others may have been set aside since; of one from outside, which
        the config names or does not, that is told."""
        for hook in self._hooks:
            if hook.name in state:
                hook.load_state(state[hook.name])
        for name in state.keys() - {hook.name for hook in self._hooks}:
            if ":" in name:
                logger.warning("monitor.hooks does not name %s any more: what it had saved is dropped", name)


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
