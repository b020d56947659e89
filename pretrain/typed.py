"""Commands that are printed to be typed: pasted into a shell they do what is said, whatever is in a name or a path."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipelines.typed import runnable, typed
from pretrain.errors import ConfigError
from pretrain.yaml_text import parse_yaml

__all__ = ["RUNS", "override", "runnable", "typed", "typed_for_runs"]

RUNS = Path("runs")
"""Where commands look for runs by themselves."""


def typed_for_runs(verb: str, name: str, folder: Path, *options: str) -> str:
    """A command on launched runs: `name` is a run's, or a pattern, under `folder`."""
    where = [] if folder.resolve() == RUNS.resolve() else ["--runs", str(folder)]
    return typed(verb, *options, name, *where)


def override(key: str, value: str | Path) -> str:
    """`key=value` with a text that is read back as this text."""
    text = str(value)
    try:
        is_plain = parse_yaml(text, key) == text
    except ConfigError:
        is_plain = False
    text = text if is_plain else json.dumps(text, ensure_ascii=False, allow_nan=False)
    return f"{key}={text.replace('${', chr(92) + '${' if is_plain else chr(92) * 2 + '${')}"
