"""`parallel: auto`: the fastest layout that fits the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pretrain.config.nearest import check_layout
from pretrain.errors import ConfigError
from pretrain.plan.layouts import GIB, ROOM, Suggestion, describe, tried_layouts

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.hardware import Accelerator

RIVALS = 2
"""Other layouts that are named beside the chosen one."""


@dataclass(frozen=True)
class Choice:
    """config: with the layout in the place of what was open. reason: in two or three lines."""

    config: Config
    reason: str


def choose_layout(
    config: Config, world: int, accelerator: Accelerator, known: dict[Any, Any] | None = None
) -> Choice:
    """The fastest layout of `world` ranks that fits, among those that differ in the keys that are auto, and in the rows
    of a micro-batch where the config leaves them open.

    A pure function of its arguments: all ranks choose alike. Needs torch.distributed unused. known: as in
    `tried_layouts`.

    Raises ConfigError where none is possible, or none fits, with the one that comes next and what would make it fit.
    """
    free = config.parallel.auto
    tried = tried_layouts(config, world, accelerator, free, known)
    if not tried:
        check_layout(config, world)  # says what is wrong with the keys that are not open
        keys = ", ".join(f"parallel.{key}" for key in free)
        message = f"no layout of {world} ranks is possible with {keys} open and the others as they are"
        raise ConfigError(f"parallel.auto: {message}; open more keys, or start another number of ranks")
    fitting = sorted((one for one in tried if one.fits(accelerator)), key=_speed)
    if not fitting:
        raise ConfigError(_too_large(tried, world, accelerator))
    best = fitting[0]
    rivals = {one.division: one for one in reversed(fitting) if one.division != best.division}
    named = sorted(rivals.values(), key=_speed)[:RIVALS]
    lines = [
        f"layout chosen for {world} x {accelerator.name}: {_told(best)}",
        f"the fastest by the plan of {len(fitting)} that fit, {len(tried)} tried"
        + "".join(f"; next: {_told(one)}" for one in named),
    ]
    parallel = best.parallel.model_copy(update={"auto": ()})
    data = config.data.model_copy(update={"micro_batch_rows": best.layout.micro_batch_rows})
    return Choice(replace(config, parallel=parallel, data=data), "\n".join(lines))


def _speed(one: Suggestion) -> tuple[float, str]:
    return one.layout.time.total, one.settings


def _told(one: Suggestion) -> str:
    memory, rows = one.layout.memory.total / GIB, one.layout.micro_batch_rows
    each = f"{rows} row{'s' if rows > 1 else ''} at once"
    return f"{describe(one.parallel)}, {each} ({one.layout.time.total:.3g} s/step, {memory:.3g} GiB)"


def _too_large(tried: list[Suggestion], world: int, accelerator: Accelerator) -> str:
    least = min(tried, key=lambda one: (one.layout.memory.total, *_speed(one)))
    memory = least.layout.memory
    room = ROOM * accelerator.memory_gib
    message = (
        f"parallel.auto: no layout of {world} x {accelerator.name} fits; the nearest, {_told(least)}, is "
        f"{memory.total / GIB - room:.3g} GiB above the {room:.3g} GiB that may be filled"
    )
    if memory.state >= memory.activations + memory.logits:
        more = "more GPUs, over which ZeRO divides what the optimizer holds, or parallel.offload=optimizer"
    else:
        more = "a shorter data.sequence_length, or ranks that share rows (parallel.context)"
    return f"{message}; take {more}, or a smaller model"
