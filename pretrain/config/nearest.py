"""What is wrong with a layout, all at once, and the layout next to it that can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pretrain.config.data import DataSection
from pretrain.config.layout import layout_problems
from pretrain.config.section import Problem, told
from pretrain.config.sections import Config, ParallelSection
from pretrain.config.world import world_problems
from pretrain.errors import ConfigError

AXES = ("tensor", "context", "pipeline")
PER_OTHER_KEY = 0.1
"""What changing another key counts, where doubling an axis counts 1."""
MOST = 64
"""Ranks along an axis that are looked at where the number of processes is not known."""


def check_layout(config: Config, world: int) -> None:
    """Raises ConfigError where a config's layout does not fit so many processes."""
    settings = (config.parallel, config.model, config.data, world)
    problems = list(problems_of(*settings))
    if problems:
        raise ConfigError(told("layout error", problems, advice(*settings)))


def problems_of(
    parallel: ParallelSection, model: Any, data: DataSection, world: int | None
) -> Iterator[Problem]:
    """All that is wrong with a layout of this model and these rows.

    world: the number of processes, where it is known.
    """
    told_of = set()
    for problem in layout_problems(parallel, model, data):
        told_of.add(problem.path)
        yield problem
    if world is not None:
        found = world_problems(parallel, world, data.global_batch_rows)
        yield from (problem for problem in found if problem.path not in told_of)


def nearest_layout(
    parallel: ParallelSection, model: Any, data: DataSection, world: int | None
) -> ParallelSection | None:
    """The layout without problems whose axes differ least from these, by their ratios; None if there is none.

    It has the same rows. Where an axis rules out another setting, that is changed too.
    """
    nearest, distance = None, math.inf
    for sizes in sorted(_all_sizes(parallel, model, world), key=lambda sizes: _ratios(parallel, sizes)):
        if _ratios(parallel, sizes) >= distance:
            break  # other keys only add to it
        settled = _settled(parallel, sizes, model, data)
        for one in (settled, settled.model_copy(update={"data": "auto"})):
            if _distance(parallel, one) < distance and not any(problems_of(one, model, data, world)):
                nearest, distance = one, _distance(parallel, one)
    return nearest


def advice(parallel: ParallelSection, model: Any, data: DataSection, world: int | None) -> str:
    """What to write on the command line for the nearest layout."""
    nearest = nearest_layout(parallel, model, data, world)
    if nearest is None:
        return (
            "no layout of this model takes these rows; change data.sequence_length or data.global_batch_rows"
        )
    return f"the nearest layout that fits: {' '.join(overrides(parallel, nearest))}"


def overrides(before: ParallelSection, after: ParallelSection) -> list[str]:
    """What to write on the command line to make one layout of another."""
    return [
        f"parallel.{key}={str(value).lower()}"
        for key, value in after.model_dump().items()
        if value != getattr(before, key)
    ]


def _all_sizes(parallel: ParallelSection, model: Any, world: int | None) -> Iterator[dict[str, int]]:
    for sizes in itertools.product(*(_sizes(parallel, axis, model, world) for axis in AXES)):
        if world is None or world % math.prod(sizes) == 0:
            yield dict(zip(AXES, sizes, strict=True))


def _sizes(parallel: ParallelSection, axis: str, model: Any, world: int | None) -> Iterable[int]:
    """Of one axis, those worth a look: few enough that all combinations can be tried."""
    most = min(max(8, 2 * getattr(parallel, axis)), MOST if world is None else world)
    sizes = [n for n in range(1, most + 1) if world is None or world % n == 0]
    if axis == "tensor":
        return [n for n in sizes if not model.division_problems(n)]
    if axis == "pipeline":
        return [n for n in sizes if n <= model.layers]
    return sizes


def _settled(
    parallel: ParallelSection, sizes: Mapping[str, int], model: Any, data: DataSection
) -> ParallelSection:
    """With these sizes; settings that they rule out are changed to what goes with any."""
    one = parallel.model_copy(update=sizes)
    interleaved = one.pipeline_chunks > 1 and one.pipeline > 1
    if not interleaved or model.layers % (one.pipeline * one.pipeline_chunks):
        one = one.model_copy(update={"pipeline_chunks": 1})
    if one.sequence and (one.tensor == 1 or data.sequence_length % (one.tensor * one.context)):
        one = one.model_copy(update={"sequence": False})
    if one.pipeline > 1 and one.engine == "deepspeed":
        one = one.model_copy(update={"engine": "auto"})
    if one.chosen_engine == "megatron" and one.zero > 1:
        one = one.model_copy(update={"zero": 1})
    if one.zero != 3:
        one = one.model_copy(update={"zero_group": "all"})
    if one.chosen_engine == "megatron" or one.zero == 0:
        one = one.model_copy(update={"offload": "none"})
    able = hasattr(model, "summary_problems") and not model.summary_problems()
    if one.recurrence == "summaries" and (one.context == 1 or not able):
        one = one.model_copy(update={"recurrence": "channels"})
    return one


def _ratios(asked: ParallelSection, sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log2(size / getattr(asked, axis))) for axis, size in sizes.items())


def _distance(asked: ParallelSection, candidate: ParallelSection) -> float:
    others = sum(
        getattr(asked, key) != getattr(candidate, key) for key in type(asked).model_fields if key not in AXES
    )
    return _ratios(asked, {axis: getattr(candidate, axis) for axis in AXES}) + PER_OTHER_KEY * others
