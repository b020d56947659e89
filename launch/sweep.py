"""`--sweep key=[value, value]`: one config per combination of the values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import yaml

from pretrain.config import Config, load_config
from pretrain.errors import ConfigError
from pretrain.yaml_text import parse_yaml


def sweep_configs(
    path: str, overrides: Sequence[str], sweeps: Sequence[str], *, allow_env: bool = False
) -> tuple[Config, ...]:
    """One config per combination of the swept values, each with a run name of its own.

    sweeps: `key=[value, value]`. Raises ConfigError.
    """
    axes = [_axis(text) for text in sweeps]
    base = load_config(path, overrides, allow_env=allow_env)
    found = []
    for combination in itertools.product(*axes):
        # A value is written as YAML again, so that lists and nulls survive.
        settings = [f"{key}={_plain(value)}" for key, value in combination]
        name = "-".join(
            [base.run.name, *(f"{key.split('.')[-1]}-{_plain(value)}" for key, value in combination)]
        )
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        found.append(load_config(path, [*overrides, *settings, f"run.name={name}"], allow_env=allow_env))
    names = [config.run.name for config in found]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"--sweep gives {len(names)} runs, and more than one would be called {', '.join(twice)}"
        )
    return tuple(found)


def swept_keys(sweeps: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.partition("=")[0] for text in sweeps)


def _axis(text: str) -> list[tuple[str, Any]]:
    key, equals, values = text.partition("=")
    try:
        listed = parse_yaml(values, f"--sweep {key}") if equals else None
    except ConfigError:
        listed = None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"--sweep {text}: write key=[value, value], e.g. --sweep 'optim.lr=[1e-3,3e-3]'")
    return [(key, value) for value in listed]


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
