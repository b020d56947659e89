"""Each section by itself: what pydantic finds, told by path, value, what would be right, and a near miss."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from models.own import own_class
from pretrain.config.data import DataSection
from pretrain.config.kinds import settings_of, with_whole_numbers, wrong_kinds
from pretrain.config.objective import OBJECTIVES, ObjectiveSection
from pretrain.config.own import HookSection, OwnDataSection
from pretrain.config.section import Problem, Section, told
from pretrain.config.sections import SECTIONS, MonitorSection
from pretrain.errors import ConfigError

S = TypeVar("S", bound=Section)


def validated_section(name: str, section: type[S], raw: Any) -> tuple[S | None, list[Problem]]:
    if raw is None:
        raw = {}
    wrong = wrong_kinds(name, section, raw)
    raw = with_whole_numbers(section, raw)
    try:
        return section.model_validate(raw), wrong
    except ValidationError as error:
        nested = _nested_names(section)
        return None, _together(wrong, _problems(name, error, list(section.model_fields), nested))


def validated_objective(raw: Any) -> tuple[ObjectiveSection | None, list[Problem]]:
    """The section of the kind that it names: one of `OBJECTIVES`, or `module:Class`."""
    kind = raw.get("kind", "next_token") if isinstance(raw, dict) else "next_token"
    if isinstance(kind, str) and ":" in kind:
        return validated_own("objective", ObjectiveSection, kind, raw, at="objective.kind")
    if str(kind) not in OBJECTIVES:
        choices = f"; choose one of {', '.join(OBJECTIVES)}, or a module:Class of your own"
        near = did_you_mean(str(kind), list(OBJECTIVES)) or choices
        return None, [Problem("objective.kind", "no such objective" + near, kind, True)]
    return validated_section("objective", OBJECTIVES[str(kind)], raw)


def validated_own(
    path: str, kind: type[S], name: str, values: Any, at: str | None = None
) -> tuple[S | None, list[Problem]]:
    """The settings of something from outside, whose class is under `kind`. at: the key that names it, if not `path`."""
    try:
        section = own_class(name, kind)
    except ValueError as error:
        return None, [Problem(at or path, str(error))]
    return validated_section(path, section, values)


def validated_own_data(raw: dict[str, Any]) -> tuple[OwnDataSection | None, list[Problem]]:
    """Of `data.own`, which has the class's name among the settings."""
    if not isinstance(raw.get("name"), str):
        return None, [Problem("data.own.name", "missing; name a module:Class of your own, an OwnDataSection")]
    values = {key: value for key, value in raw.items() if key != "name"}
    return validated_own("data.own", OwnDataSection, raw["name"], values, at="data.own.name")


def hook_sections(monitor: MonitorSection) -> dict[str, HookSection]:
    """Of the hooks that a config names, whose settings have been found valid."""
    found = {name: validated_own(name, HookSection, name, values) for name, values in monitor.hooks.items()}
    return {name: _valid(section, problems) for name, (section, problems) in found.items()}


def own_data_section(data: DataSection) -> OwnDataSection:
    """Of `data.own`, which has been found valid."""
    assert data.own is not None
    return _valid(*validated_own_data(data.own))


def _valid(section: S | None, problems: list[Problem]) -> S:
    if section is None:  # the module has changed since, or its validation is not a function of the settings
        raise ConfigError(told("config error", problems))
    return section


def _together(wrong: list[Problem], others: Iterator[Problem]) -> list[Problem]:
    """Each setting once: a value of the wrong kind is often out of range, too."""
    told_of = {problem.path for problem in wrong}
    return wrong + [problem for problem in others if problem.path not in told_of]


def validated_model(raw: Any) -> tuple[Any, list[Problem]]:
    from models import configs
    from models.layers.limits import beyond_limits, too_large

    if raw is not None and not isinstance(raw, dict):
        return None, [
            Problem("model", "should be settings of its own: {family: ..., layers: ...}", raw, True)
        ]
    if not isinstance(raw, dict) or "family" not in raw:
        return None, [Problem("model.family", f"missing; choose one of {', '.join(configs)}")]
    if not isinstance(raw["family"], str) or raw["family"] not in configs:
        near = did_you_mean(str(raw["family"]), list(configs)) or f"; choose one of {', '.join(configs)}"
        return None, [Problem("model.family", "no such family" + near, raw["family"], True)]
    kind = configs[raw["family"]]
    names = [field.name for field in dataclasses.fields(kind)]
    # A misspelt key is reported by us: a plain dataclass has nowhere to say `extra="forbid"`.
    problems = [
        Problem(f"model.{key}", "no such setting" + _suggest("model", str(key), names))
        for key in raw
        if key not in names
    ]
    wrong = wrong_kinds("model", kind, raw)
    raw = with_whole_numbers(kind, raw)
    try:
        model: Any = TypeAdapter(kind).validate_python({key: raw[key] for key in raw if key in names})
    except ValidationError as error:
        return None, problems + _together(wrong, _problems("model", error, names, _nested_names(kind), kind))
    beyond = [
        Problem(f"model.{key}", message, attrgetter(key)(model), True)
        for key, message in beyond_limits(model)
    ]
    # What else is wrong with a model that is too large could take as long as building it.
    return (None if too_large(model) else model), problems + _together(wrong, iter(beyond))


def _nested_names(kind: type) -> list[str]:
    """The settings of those settings that are settings within settings, such as `model.newton`."""
    nested = [part for hint in settings_of(kind).values() for part in _parts_of(hint)]
    return list(dict.fromkeys(name for part in nested for name in settings_of(part)))


def _parts_of(hint: Any) -> Iterator[Any]:
    """A type, and all that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from _parts_of(part)


def _names_in(kind: Any, keys: Sequence[str]) -> list[str]:
    """The settings of the dataclass that lies at these keys below `kind`; none if there is none."""
    for key in keys:
        hint = get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
        kind = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _problems(
    section: str,
    error: ValidationError,
    names: list[str],
    inner: Sequence[str] = (),
    kind: type | None = None,
) -> Iterator[Problem]:
    """inner: names of settings within settings. kind: the dataclass that was validated, if it is one."""
    seen: set[str] = set()
    for item in error.errors():
        # Branches of a union (int | "auto") add their own tag to the location; only the keys matter to a user.
        keys = _keys(item["loc"], names, inner)
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            key, nested = str(item["loc"][-1]), len(item["loc"]) > 1
            if keys and keys[-1] == key:  # a name that other settings have
                keys = keys[:-1]
            path = ".".join([section, *keys])
            near = (_names_in(kind, keys) or list(inner)) if nested else names
            yield Problem(f"{path}.{key}", "no such setting" + _suggest(path, key, near))
            continue
        path = ".".join([section, *keys])
        if item["type"] == "missing":
            yield Problem(path, "missing; it has no default")
        elif path not in seen:
            seen.add(path)
            alternatives = [
                other for other in error.errors() if _within(_keys(other["loc"], names, inner), keys)
            ]
            if any(len(other["loc"]) > len(item["loc"]) + 1 for other in alternatives):
                continue  # another branch of the union came further: what it says is nearer to the mistake
            message = " or ".join(dict.fromkeys(_plain(other["msg"]) for other in alternatives))
            yield Problem(path, message, item["input"], True)


def _keys(location: Sequence[int | str], names: Sequence[str], inner: Sequence[str]) -> list[str]:
    return [str(part) for part in location if isinstance(part, int) or part in names or part in inner]


def _within(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two settings is the other or a part of it."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _plain(message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("Input should be", "should be")
    plain = re.sub(r"a valid dictionary or (instance|object) .*", "settings of its own: {key: value}", plain)
    return plain.replace("a valid tuple", "a list, e.g. [a, b]").replace("should be 'auto'", "auto")


def _suggest(section: str, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {section}.{near[0]}?"
    elsewhere = [f"{other}.{key}" for other, kind in SECTIONS.items() if key in kind.model_fields]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; {section} has {', '.join(names)}"


def did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
