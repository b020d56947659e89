"""Values of another kind than their key's, which validation would take for it: `layers: true` passes for 1."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from pretrain.config.references import EnvironmentText
from pretrain.config.section import Problem

YES_NO = ("y", "yes", "n", "no", "t", "true", "f", "false", "on", "off", "0", "1")
"""What validation would take for true or false."""


def wrong_kinds(path: str, kind: Any, value: Any) -> list[Problem]:
    """Of `value` and all within it, which is to become a `kind`: a section, a model's settings, or one setting.

    What is of no kind at all that could be meant, validation tells in its own words.
    """
    return list(_wrong(path, kind, value))


def _wrong(path: str, kind: Any, value: Any) -> Iterator[Problem]:
    alternatives = list(_alternatives(kind))
    if Any in alternatives:
        return
    if isinstance(value, dict):
        for one in alternatives:
            hints = settings_of(one)
            for key in value.keys() & hints.keys():
                yield from _wrong(f"{path}.{key}", hints[key], value[key])
    elif isinstance(value, list | tuple):
        for one in alternatives:
            if get_origin(one) is tuple:
                inner = [part for part in get_args(one) if part is not Ellipsis]
                for number, item in enumerate(value):
                    yield from _wrong(f"{path}.{number}", inner[min(number, len(inner) - 1)], item)
    elif (message := _message(alternatives, value)) is not None:
        yield Problem(path, message, value, True)


def with_whole_numbers(kind: Any, value: Any) -> Any:
    """`value`, with 1e6 as 1000000 where a `kind` takes whole numbers alone, however large they are."""
    alternatives = list(_alternatives(kind))
    if isinstance(value, dict):
        hints: dict[str, Any] = {}
        for one in alternatives:
            hints |= settings_of(one)
        return {
            key: with_whole_numbers(hints[key], inner) if key in hints else inner
            for key, inner in value.items()
        }
    if isinstance(value, list):
        inner = [get_args(one)[0] for one in alternatives if get_origin(one) is tuple]
        return [with_whole_numbers(inner[0], item) for item in value] if inner else value
    if isinstance(value, float) and value.is_integer() and int in alternatives and float not in alternatives:
        return int(value)
    return value


def settings_of(kind: Any) -> dict[str, Any]:
    """The settings of a section or of a dataclass, each with its kind; none of anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {
            name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            for name, field in kind.model_fields.items()
        }
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _alternatives(kind: Any) -> Iterator[Any]:
    """The branches of a union; the values of a Literal stand for themselves, each in a Literal of its own."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    elif origin is Literal:
        for choice in get_args(kind):
            yield Literal[choice]
    else:
        yield kind


def _message(alternatives: list[Any], value: Any) -> str | None:
    """What is wrong with the kind of one plain value, if validation would not see it."""
    choices = [get_args(one)[0] for one in alternatives if get_origin(one) is Literal]
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return None
    numeric = bool({int, float} & set(alternatives)) or any(type(choice) is int for choice in choices)
    if isinstance(value, bool):
        return "should be a number, not yes or no" if numeric and bool not in alternatives else None
    if isinstance(value, float) and not math.isfinite(value):
        return "should be a finite number" if numeric else None
    if isinstance(value, int | float):
        return "should be true or false, not a number" if bool in alternatives and not numeric else None
    if isinstance(value, str) and not isinstance(value, EnvironmentText) and str not in alternatives:
        if numeric and _is_number(value):
            return "should be a number, not text; write it without quotes"
        if bool in alternatives and value.lower() in YES_NO:
            return "should be true or false, not text; write it without quotes"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
