"""Tasks by name, from plain values."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from data_pipelines.errors import DataError
from data_pipelines.tasks.base import Task
from data_pipelines.tasks.recall import KeepNth, KHop, Mqar
from data_pipelines.tasks.state import A5, CycleNavigation, ModularArithmetic, Parity

MOST = 1_000_000
"""Of any option: what is beyond is a typing error."""

TASKS: Mapping[str, type[Task]] = {
    kind.name: kind for kind in (Parity, KeepNth, Mqar, KHop, ModularArithmetic, CycleNavigation, A5)
}


def build_task(values: Mapping[str, Any]) -> Task:
    """The task of `{name: k_hop, hops: 2, ...}`.

    Raises:
        DataError: one line per problem: an unknown name or option, a value of the wrong kind.
    """
    name = str(values.get("name"))
    if name not in TASKS:
        raise DataError(f"task {name} is unknown{_near(name, list(TASKS))}; the tasks are {', '.join(TASKS)}")
    kind = TASKS[name]
    hints = {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    options = {key: value for key, value in values.items() if key != "name"}
    found = [_problem(name, key, value, hints) for key, value in options.items()]
    if problems := [problem for problem in found if problem]:
        raise DataError("; ".join(problems))
    return kind(**options)


def _problem(task: str, key: str, value: Any, hints: Mapping[str, Any]) -> str | None:
    if key not in hints:
        return f"task {task} has no option {key}{_near(key, list(hints))}; it has {', '.join(hints)}"
    if hints[key] is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{key} = {value!r} should be a whole number"
        return None if abs(value) <= MOST else f"{key} = {value} should be at most {MOST:,}"
    choices = get_args(hints[key])
    return None if value in choices else f"{key} = {value!r} should be {' or '.join(choices)}"


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""
