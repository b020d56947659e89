"""YAML as configs are written, read so that no file can hang, exhaust or surprise the program that opens it.

What a file may hold is mappings with names for keys, lists, text, numbers, true, false and null. A file is walked once,
event by event, before anything is built of it: nesting and aliases are counted there, however they are written.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import ConfigError

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

MOST_BYTES = 1 << 20
MOST_DEPTH = 40
MOST_VALUES = 50_000
"""In all, each alias counted as what it stands for."""

LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class ConfigLoader(SafeLoader):
    """YAML in which 1e-3 is a number, as everyone who writes a learning rate expects, and 12:00:00 is none; a date is
    text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name in lines:
                    raise yaml.MarkedYAMLError(
                        problem=f"{name} stands twice, in line {lines[name]} too; keep one of them",
                        problem_mark=key.start_mark,
                    )
                if name is not None:
                    lines[name] = line
        return super().construct_mapping(node, deep)


def _whole_number(loader: ConfigLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    if LEADING_ZERO.fullmatch(text):
        raise yaml.MarkedYAMLError(
            problem=f"{text} begins with 0; write {text.lstrip('+-0_') or '0'}, or '{text}' in quotes for text",
            problem_mark=node.start_mark,
        )
    return int(loader.construct_yaml_int(node))


ConfigLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+)$"),
    list("-+0123456789."),
)
ConfigLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; an empty file is an empty one. Raises ConfigError, in one line."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content[:MOST_BYTES].decode() if len(content) <= MOST_BYTES else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: it is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if text is None:
        raise ConfigError(f"{path}: more than {MOST_BYTES:,} bytes, which is no config")
    found = parse_yaml(text, str(path))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found a {type(found).__name__}")
    return found


def parse_yaml(text: str, origin: str) -> Any:
    """The values of a text. `origin` names it in the error.

    Raises ConfigError, in one line: no YAML, nested too deep, too large once its aliases are written out, a key that
    stands twice, or a value that is no text, number, true, false, null, list or mapping.
    """
    try:
        _measure(text, origin)
        found = yaml.load(text, Loader=ConfigLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        said = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{origin}: not valid YAML{where}: {said}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:  # not reached within MOST_DEPTH; kept for what else a reader may do
        raise ConfigError(f"{origin}: not valid YAML: nested too deep") from None
    check_plain(found, origin)
    return found


def _measure(text: str, origin: str) -> None:
    """Raises ConfigError if the text is nested too deep, or too large with its aliases written out."""
    sizes: dict[str, int] = {}  # of what an anchor stands for
    open_: list[tuple[str | None, int]] = []  # collections: their anchor, and the values counted before them
    count = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_}:
                raise ConfigError(f"{origin}: {_line(event)}: *{event.anchor} stands inside of itself")
            count += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.ScalarEvent):
                _note(sizes, event.anchor, 1)
            else:
                open_.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            _note(sizes, anchor, count - before)
        if len(open_) > MOST_DEPTH:
            raise ConfigError(
                f"{origin}: {_line(event)}: nested more than {MOST_DEPTH} deep, which no config is"
            )
        if count > MOST_VALUES:
            raise ConfigError(
                f"{origin}: {_line(event)}: more than {MOST_VALUES:,} values, aliases written out, which no config has"
            )


def _note(sizes: dict[str, int], anchor: str | None, size: int) -> None:
    if anchor is not None:
        sizes[anchor] = size


def _line(event: yaml.Event) -> str:
    return "" if event.start_mark is None else f"line {event.start_mark.line + 1}"


def check_plain(value: Any, origin: str, path: str = "") -> None:
    """Raises ConfigError for values that a config cannot hold: keys that are no names, dates, bytes, sets."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                at = f" under {path}" if path else ""
                raise ConfigError(
                    f"{origin}: the key {key!r}{at} is no name; write it in quotes if it is meant so"
                )
            check_plain(inner, origin, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check_plain(inner, origin, f"{path}[{number}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ConfigError(
            f"{origin}: {path} is a {type(value).__name__}; a value is text, a number, true, false, null, a list or a "
            "mapping"
        )
