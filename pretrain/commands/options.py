"""Options of a command in groups: dataclasses whose fields become its options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")


def with_options(**groups: type[Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A decorator for a typer command that takes each group as an object, under the group's name.

    The fields of the dataclasses are annotated as parameters of a typer command are, and have defaults. The command's
    other parameters come first.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in groups
        ]
        options = [parameter for group in groups.values() for parameter in _parameters(group)]

        def command(**values: Any) -> Result:
            objects = {
                name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
                for name, group in groups.items()
            }
            return function(**values, **objects)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [*own, *options]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def given(group: Any) -> dict[str, Any]:
    """The options of a group that were chosen: those that are not None."""
    values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def flag(name: str) -> str:
    """The option of a field: `top_p` is --top-p."""
    return f"--{name.replace('_', '-')}"
