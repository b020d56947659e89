"""Every hook of a run, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterator

from models.own import named
from pretrain.config.validation import hook_sections
from pretrain.hooks.base import Hook, Hooks, Setup
from pretrain.hooks.checkpoints import CheckpointHook
from pretrain.hooks.evaluation import EvaluationHook
from pretrain.hooks.finite import FiniteHook
from pretrain.hooks.metrics import MetricsHook
from pretrain.hooks.newton import NewtonHook
from pretrain.hooks.samples import DiffusionSampleHook, SampleHook
from pretrain.hooks.tasks import TaskHook
from pretrain.hooks.watchdog import WatchdogHook

BEFORE_SAVE: tuple[type[Hook], ...] = (
    FiniteHook,  # first: what the others see is of steps whose gradient was finite
    NewtonHook,
    MetricsHook,
    EvaluationHook,
    TaskHook,
)
"""Then come those from outside: a save has the state that each of these has after the step."""
SAVE_AND_AFTER: tuple[type[Hook], ...] = (
    CheckpointHook,
    SampleHook,  # after the save: sampling has no state, and whatever goes wrong in it must not cost the final one
    DiffusionSampleHook,
    WatchdogHook,
)


def build_hooks(setup: Setup) -> Hooks:
    """Those that the run needs, and those that its config names."""
    return Hooks([*_needed(BEFORE_SAVE, setup), *_from_outside(setup), *_needed(SAVE_AND_AFTER, setup)])


def _needed(kinds: tuple[type[Hook], ...], setup: Setup) -> Iterator[Hook]:
    for kind in kinds:
        hook = kind.of(setup)
        if hook is not None:
            yield hook


def _from_outside(setup: Setup) -> Iterator[Hook]:
    for name, section in hook_sections(setup.config.monitor).items():
        hook: Hook = named(section.hook)(section)
        hook.name = name
        yield hook
