"""Rules between the settings of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from pretrain.config.data import DataSection
from pretrain.config.nearest import advice, problems_of
from pretrain.config.objective import ObjectiveSection
from pretrain.config.optim import OptimSection
from pretrain.config.own import HookSection
from pretrain.config.section import Problem, divisors_of
from pretrain.config.sections import (
    MonitorSection,
    ParallelSection,
    PrecisionSection,
    RunSection,
)
from pretrain.config.validation import validated_own, validated_own_data


def cross_checks(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules between settings. Each runs where the sections it reads are valid by themselves."""
    rules: list[tuple[Callable[..., Iterator[Problem]], tuple[str, ...]]] = [
        (_check_model, ("model", "data")),
        (_check_own_mixers, ("model", "data")),
        (_check_precision, ("precision", "parallel")),
        (_check_batch, ("data",)),
        (_check_hooks, ("monitor",)),
        (_check_own_data, ("data",)),
        (_check_objective, ("objective", "model", "data")),
        (_check_task, ("data", "monitor")),
        (_check_evaluation, ("data", "monitor")),
        (_check_optim, ("optim", "run")),
        (_check_scaling, ("optim", "model")),
    ]
    for rule, needs in rules:
        if all(name in sections for name in needs):
            yield from rule(*(sections[name] for name in needs))


def checked_layout(sections: Mapping[str, Any], world: int | None) -> tuple[list[Problem], str]:
    """What is wrong with the layout, and the nearest one that can be."""
    if not {"parallel", "model", "data"} <= sections.keys():
        return [], ""
    settings = (sections["parallel"], sections["model"], sections["data"], world)
    problems = list(problems_of(*settings))
    return problems, advice(*settings) if problems else ""


def _check_model(model: Any, data: DataSection) -> Iterator[Problem]:
    for key, message in model.problems(data.sequence_length):
        yield Problem(f"model.{key}", message, _value_at(model, key), True)


def _check_own_mixers(model: Any, data: DataSection) -> Iterator[Problem]:
    """That mixers from outside can be made and counted."""
    if not any(":" in name for name in getattr(model, "mixers", ())) or model.problems(data.sequence_length):
        return
    from models.hybrid.undeclared import unmade  # imports torch, as those mixers do

    for key, message in unmade(model, data.sequence_length):
        yield Problem(f"model.{key}", message)


def _value_at(model: Any, key: str) -> Any:
    """A setting of the model by its dotted key; of a mixer of one's own, whose name may have dots, from its own."""
    if key.startswith("own."):
        name, _, setting = key.removeprefix("own.").rpartition(".")
        return getattr(model.settings(name), setting)
    return attrgetter(key)(model)


def _check_precision(precision: PrecisionSection, parallel: ParallelSection) -> Iterator[Problem]:
    if precision.dtype == "bf16" and parallel.zero == 0:
        yield Problem(
            "parallel.zero",
            "bf16 without sharded optimizer states keeps no exact master weights; use 1, also on one GPU",
            0,
            True,
        )


def _check_batch(data: DataSection) -> Iterator[Problem]:
    given = [key for key in ("path", "task", "own") if getattr(data, key) is not None]
    if not given:
        yield Problem("data.path", "missing; name a dataset folder, or a synthetic task under data.task")
    for key in given[1:]:
        yield Problem(f"data.{key}", f"data.{given[0]} is set too; set one of them to null")
    if isinstance(data.path, tuple) and not data.path:
        yield Problem("data.path", "the list of sources is empty; name at least one dataset folder")
    micro = data.micro_batch_rows
    if isinstance(micro, int) and data.global_batch_rows % micro:
        near = min(divisors_of(data.global_batch_rows), key=lambda n: abs(n - micro))
        yield Problem(
            "data.micro_batch_rows",
            f"data.global_batch_rows = {data.global_batch_rows} does not divide by it; use {near}",
            micro,
            True,
        )


def _check_objective(objective: ObjectiveSection, model: Any, data: DataSection) -> Iterator[Problem]:
    if objective.rows == "whole" and data.task is not None:
        yield Problem(
            "data.task", "synthetic tasks are for objective.kind=next_token; name data.path instead"
        )
    if objective.rows == "whole" and data.own is not None:
        yield Problem(
            "data.own", f"{objective.kind} learns whole documents, which data.path has; name that instead"
        )
    yield from objective.problems(model, data)


def _check_hooks(monitor: MonitorSection) -> Iterator[Problem]:
    for name, values in monitor.hooks.items():
        yield from validated_own(f"monitor.hooks.{name}", HookSection, name, values)[1]


def _check_own_data(data: DataSection) -> Iterator[Problem]:
    if data.own is not None:
        yield from validated_own_data(data.own)[1]


def _check_task(data: DataSection, monitor: MonitorSection) -> Iterator[Problem]:
    if data.task is None:
        if monitor.evaluate_length is not None:
            yield Problem(
                "monitor.evaluate_length",
                "only synthetic tasks have it; remove it",
                monitor.evaluate_length,
                True,
            )
        return
    from data_pipelines.tasks import build_task

    lengths = {
        "data.sequence_length": data.sequence_length,
        "monitor.evaluate_length": monitor.evaluate_length,
    }
    for key, length in lengths.items():
        if length is not None:
            for option, message in build_task(data.task).problems(length):
                yield Problem(f"data.task.{option}", f"{message} ({key} = {length})")


def _check_evaluation(data: DataSection, monitor: MonitorSection) -> Iterator[Problem]:
    sources, rows = len(data.sources), monitor.evaluate_rows
    if rows is not None and rows < sources:
        message = f"some of the {sources} sources of data.path would not be evaluated; use at least {sources}"
        yield Problem("monitor.evaluate_rows", message, rows, True)


def _check_optim(optim: OptimSection, run: RunSection) -> Iterator[Problem]:
    if any(not 0 <= beta < 1 for beta in optim.betas):
        yield Problem("optim.betas", "both should be at least 0 and below 1", list(optim.betas), True)
    if optim.warmup_steps >= run.steps:
        yield Problem(
            "optim.warmup_steps",
            f"should be below run.steps = {run.steps}, else the peak is never reached",
            optim.warmup_steps,
            True,
        )
    decay = optim.decay_steps
    if decay is not None and optim.schedule != "wsd":
        yield Problem(
            "optim.decay_steps",
            "only the wsd schedule has it; set optim.schedule=wsd or remove it",
            decay,
            True,
        )
    length = optim.wsd_decay_steps(run.steps)
    if optim.schedule == "wsd" and optim.warmup_steps + length > run.steps:
        message = f"{optim.warmup_steps} warm-up and {length} decay steps exceed run.steps = {run.steps}"
        yield Problem("optim.decay_steps", message, decay, True)


def _check_scaling(optim: OptimSection, model: Any) -> Iterator[Problem]:
    for key, message, value in optim.scaling_problems(tied_head=getattr(model, "tied_head", False)):
        yield Problem(f"optim.{key}", message, value, value is not None)
