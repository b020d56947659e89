"""References in a config: `${run.name}` is the value of another key, `${oc.env:NAME}` one of the environment.

The environment is no part of a config, and may hold what is nobody's business (keys, tokens): it is read only where the
user allows it. Nothing else can be called. The grammar is OmegaConf's, as far as keys go: `${a.b[0]}`, `${.sibling}`,
`${..key_of_the_parent}`, `${a.${b}}`; `\\${` is no reference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.config.section import Problem

MOST_STEPS = 10_000
MOST_PROBLEMS = 20
MOST_CHARACTERS = 1_000_000
"""Of all texts that references are put into."""
MOST_CHAINED = 50
ENVIRONMENT = "oc.env"
MISSING = "???"
KEY = re.compile(r"(\.*)([A-Za-z0-9_-]+(?:\[\d+\])*(?:\.[A-Za-z0-9_-]+(?:\[\d+\])*)*)")
RESOLVER = re.compile(r"\s*([A-Za-z_][\w.]*)\s*:(.*)", re.DOTALL)

Path = tuple[str | int, ...]


class EnvironmentText(str):
    """What `${oc.env:NAME}` alone stands for: text that may be meant as a number."""


class _ReferenceError(Exception):
    """What is wrong with one reference."""


def resolved(values: Mapping[str, Any], *, allow_env: bool = False) -> tuple[dict[str, Any], list[Problem]]:
    """The values with every reference replaced, and what is wrong with those that cannot be."""
    work = _Resolver(values, allow_env)
    found = work.walk(values, ())
    return found, work.problems


@dataclass
class _Resolver:
    root: Mapping[str, Any]
    allow_env: bool
    problems: list[Problem] = field(default_factory=list)
    steps: int = 0
    characters: int = 0
    open: list[Path] = field(default_factory=list)
    """The texts whose references are being followed, the outermost first."""

    def walk(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.walk(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.walk(inner, (*path, number)) for number, inner in enumerate(value)]
        if isinstance(value, str) and ("${" in value or value == MISSING):
            if len(self.problems) >= MOST_PROBLEMS:
                return None
            try:
                return self.text(value, path)
            except _ReferenceError as error:
                self.problems.append(Problem(_shown(path), str(error), value, True))
                return None
        return value

    def text(self, value: str, path: Path) -> Any:
        """What a text at `path` stands for: of one reference alone its value, whatever kind that is."""
        if value == MISSING:
            raise _ReferenceError("is still to be given; set it")
        if path in self.open:
            raise _ReferenceError(f"leads back to itself by way of {_shown(path)}")
        if len(self.open) >= MOST_CHAINED:
            raise _ReferenceError(f"a chain of more than {MOST_CHAINED} references")
        self.open.append(path)
        try:
            return self.pieces(value, path)
        finally:
            self.open.pop()

    def pieces(self, value: str, path: Path) -> Any:
        parts: list[Any] = []
        rest = value
        while rest:
            begin = rest.find("${")
            if begin < 0:
                parts.append(rest)
                break
            if begin and rest[begin - 1] == "\\":
                parts += [rest[: begin - 1], "${"]
                rest = rest[begin + 2 :]
                continue
            if begin:
                parts.append(rest[:begin])
            inside, rest = _until_closed(rest[begin + 2 :])
            parts.append(self.reference(inside, path))
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, dict | list) for part in parts):
            raise _ReferenceError("a list or a mapping cannot stand inside of a text")
        joined = "".join(map(str, parts))
        self.characters += len(joined)
        if self.characters > MOST_CHARACTERS:
            raise _ReferenceError(f"comes, with the others, to more than {MOST_CHARACTERS:,} characters")
        return joined

    def reference(self, inside: str, path: Path) -> Any:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise _ReferenceError(f"more than {MOST_STEPS:,} references are followed, which no config needs")
        if "${" in inside:
            inside = str(self.pieces(inside, path))
        call = RESOLVER.fullmatch(inside)
        if call is not None:
            return self.environment(call[1], call[2])
        match = KEY.fullmatch(inside.strip())
        if match is None:
            raise _ReferenceError("write a reference as ${section.key}")
        dots, names = match.groups()
        target = self.place(path, len(dots)) + tuple(_parts(names))
        return self.at(target)

    def place(self, path: Path, dots: int) -> Path:
        """Where a key with so many dots before it begins: none is the root, one the mapping around the reference."""
        if dots > len(path):
            raise _ReferenceError("more dots than there are levels above it")
        return path[: len(path) - dots] if dots else ()

    def at(self, target: Path) -> Any:
        value: Any = self.root
        for depth, part in enumerate(target):
            if isinstance(value, str) and "${" in value:  # a reference to the mapping that is looked into
                value = self.text(value, target[:depth])
            inside = isinstance(value, dict) and part in value
            if isinstance(value, list) and isinstance(part, int):
                inside = part < len(value)
            if not inside:
                raise _ReferenceError(f"there is no {_shown(target)} to refer to")
            value = value[part]
        return self.strict(value, target)

    def strict(self, value: Any, path: Path) -> Any:
        """As `walk`, but what is wrong is the fault of the reference that led here."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise _ReferenceError(f"more than {MOST_STEPS:,} values are referred to, which no config needs")
        if isinstance(value, dict):
            return {key: self.strict(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.strict(inner, (*path, number)) for number, inner in enumerate(value)]
        return (
            self.text(value, path)
            if isinstance(value, str) and ("${" in value or value == MISSING)
            else value
        )

    def environment(self, name: str, arguments: str) -> str:
        if name != ENVIRONMENT:
            raise _ReferenceError(
                f"{name} is no function of configs; a reference is ${{section.key}}, or ${{{ENVIRONMENT}:NAME}}"
            )
        if not self.allow_env:
            raise _ReferenceError(
                "reads the environment, which a config may do only with --allow-env: give it if you trust this file, "
                "or write the value"
            )
        variable, comma, default = (part.strip() for part in arguments.partition(","))
        if variable not in os.environ and not comma:
            raise _ReferenceError(
                f"the environment has no {variable}; export it, or give a default after a comma"
            )
        return EnvironmentText(os.environ.get(variable, default.strip("'\"")))


def _until_closed(text: str) -> tuple[str, str]:
    """What stands before the brace that closes a reference, and what after it."""
    depth, place = 1, 0
    while place < len(text):
        if text.startswith("${", place):
            depth, place = depth + 1, place + 2
            if depth > 8:
                raise _ReferenceError("references within references, more than 8 deep")
            continue
        if text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[:place], text[place + 1 :]
        place += 1
    raise _ReferenceError("the reference is not closed: write ${section.key}, with its brace")


def _parts(names: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"[.\[\]]+", names) if part]


def _shown(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
