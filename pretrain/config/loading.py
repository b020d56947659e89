"""From a file, or plain values, to a `Config`; or to one error that tells all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config.merge import merged_values
from pretrain.config.rules_between_settings import checked_layout, cross_checks
from pretrain.config.section import Problem, told
from pretrain.config.sections import SECTIONS, Config
from pretrain.config.validation import did_you_mean, validated_model, validated_objective, validated_section
from pretrain.errors import ConfigError
from pretrain.yaml_text import read_yaml


def load_config(
    path: str | Path, overrides: Sequence[str] = (), world: int | None = None, *, allow_env: bool = False
) -> Config:
    """The config in `path`, with `key=value` overrides.

    world: the number of processes that the layout must fit; None: any.
    allow_env: whether it may read the environment, by `${oc.env:NAME}`.

    Raises ConfigError with all problems at once.
    """
    raw = merged_values(Path(path), overrides, allow_env=allow_env)
    return config_from_dict(raw, origin=str(path), world=world)


def load_resolved(path: str | Path, world: int | None = None) -> Config:
    """A config that `Config.to_yaml` wrote: whole, and without references."""
    return config_from_dict(read_yaml(Path(path)), origin=str(path), world=world)


def config_from_dict(raw: Mapping[str, Any], origin: str, world: int | None = None) -> Config:
    """Validate plain values. `origin` names the file in the error; `world` as in `load_config`."""
    problems: list[Problem] = []
    sections: dict[str, Any] = {}
    for name in raw:
        if name not in SECTIONS and name != "model":
            problems.append(
                Problem(str(name), "no such section" + did_you_mean(str(name), [*SECTIONS, "model"]))
            )
    for name, section in SECTIONS.items():
        given = raw.get(name, {})
        checked = (
            validated_objective(given) if name == "objective" else validated_section(name, section, given)
        )
        value, found = checked
        problems += found
        if value is not None:
            sections[name] = value
    model, found = validated_model(raw.get("model"))
    problems += found
    if model is not None:
        sections["model"] = model
    told_of = {problem.path for problem in problems}
    problems += [problem for problem in cross_checks(sections) if problem.path not in told_of]
    of_layout, nearest = checked_layout(sections, world)
    problems += of_layout
    if problems:
        raise ConfigError(told(f"config error in {origin}", problems, nearest))
    return Config(**sections)
