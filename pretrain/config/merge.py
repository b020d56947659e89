"""From files and overrides to the plain values of one config: `extends`, `key=value`, references."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config.references import resolved
from pretrain.config.section import Problem, told
from pretrain.config.sections import CHOSEN
from pretrain.errors import ConfigError
from pretrain.yaml_text import parse_yaml, read_yaml

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
MOST_LAYERS = 20
MOST_PARTS = 40


def merged_values(path: Path, overrides: Sequence[str] = (), *, allow_env: bool = False) -> dict[str, Any]:
    """The values of a file over those of the files that it extends, under `overrides`, with every reference replaced.

    A mapping is merged with the one below it, key by key; anything else replaces what is below.

    Raises ConfigError with all that was not understood.
    """
    values: dict[str, Any] = {}
    for layer in _layers(path, ()):
        values = _over(values, _whole_section(layer))
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(Problem(override, "an override is written key=value, e.g. optim.lr=3e-4"))
        elif key == "extends":
            problems.append(Problem(override, "`extends` belongs into a config file"))
        elif KEY.fullmatch(key) is None or key.count(".") >= MOST_PARTS:
            problems.append(
                Problem(
                    override,
                    f"not understood ({key} is no key; a key is section.name, and a list is set as a whole)",
                )
            )
        else:
            try:
                nested = _nested(key.split("."), parse_yaml(text, "value"))
                values = _over(values, _whole_section(nested))
            except ConfigError as error:
                problems.append(Problem(override, f"not understood ({error})"))
    found, wrong = resolved(values, allow_env=allow_env)
    problems += wrong
    if problems:
        raise ConfigError(told(f"config error in {path}", problems))
    return found


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    nested: dict[str, Any] = value
    return nested


def _whole_section(layer: dict[str, Any]) -> dict[str, Any]:
    """With `parallel: auto` written out, so that its keys can be set one by one above it."""
    return {**layer, "parallel": dict.fromkeys(CHOSEN, "auto")} if layer.get("parallel") == "auto" else layer


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _over(found[key], value) if both else value
    return found


def _layers(path: Path, chain: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The file's values and those it extends, the most general first."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `extends` leads back to this file; break the circle")
    if len(chain) > MOST_LAYERS:
        raise ConfigError(f"{path}: `extends` goes on over more than {MOST_LAYERS} files")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a config file in it")
    if not path.is_file():
        asked = f" (named by `extends` in {chain[-1]})" if chain else ""
        raise ConfigError(f"{path}: no such config file{asked}{_shipped_configs(path)}")
    values = read_yaml(path)
    parent = values.pop("extends", None)
    if parent is None:
        return [values]
    if not isinstance(parent, str) or "\0" in parent:
        raise ConfigError(f"{path}: `extends` names one file, found {parent!r}")
    return [*_layers(path.parent / parent, (*chain, path.resolve())), values]


def _shipped_configs(path: Path) -> str:
    here = sorted(str(p) for p in Path("configs").glob("*/*.yaml")) if Path("configs").is_dir() else []
    near = difflib.get_close_matches(str(path), here, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
