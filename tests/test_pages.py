"""The pages name files, modules, commands and settings that are there."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from models import configs
from pretrain.config import SECTIONS
from pretrain.config.objective import OBJECTIVES

ROOT = Path(__file__).parents[1]


def files() -> Iterator[str]:
    """Of the project, with what it made in none of them."""
    for folder, inner, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        inner[:] = [
            name
            for name in inner
            if not name.startswith((".", "__")) and name not in ("data", "runs", "build")
        ]
        yield from ((here / name).as_posix() for name in names)


TRACKED = sorted(files())
PAGES = [path for path in TRACKED if path.endswith(".md")]
FOLDERS = tuple(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
MADE_BY_RUNS = ("data/", "runs/")
MADE_BY_READERS = ("configs/cluster/mine.yaml",)
FILE = re.compile(r"[`(]((?:[\w.-]+/)+[\w.-]*)[`):]")
BARE = re.compile(r"`(\w+\.(?:py|c))`")
MODULE = re.compile(r"python -m ([\w.]+)")
COMMAND = re.compile(r"(?:`|\n +|\$ )triptych ([a-z]+)(?: ([a-z]+))?")
SETTING = re.compile(r"`([a-z]+)\.([a-z_]+)(?:[=:. ][^`]*)?`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    for named in BARE.findall(text_of(page)):
        assert any(path.endswith(f"/{named}") or path == named for path in TRACKED), f"{page} names {named}"
    for named in FILE.findall(text_of(page)):
        if named.startswith(MADE_BY_RUNS) or named in MADE_BY_READERS:
            continue
        beside = (ROOT / page).parent / named
        known = named.startswith(("../", *(f"{folder}/" for folder in FOLDERS)))
        assert not known or beside.exists() or (ROOT / named).exists(), f"{page} names {named}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_are_there(page: str) -> None:
    for named in MODULE.findall(text_of(page)):
        if f"examples/{named}/{named}.py" in TRACKED:
            continue
        assert importlib.util.find_spec(named.rstrip(".")) is not None, f"{page} names {named}"


def commands() -> dict[str, set[str]]:
    """Every command, with its subcommands."""
    import launch.cli  # noqa: F401  # which adds its commands
    from pretrain.cli import app

    found = typer.main.get_command(app)
    return {name: set(getattr(command, "commands", {})) for name, command in found.commands.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page: str) -> None:
    known = commands()
    for command, subcommand in COMMAND.findall(text_of(page)):
        assert command in known, f"{page} names triptych {command}"
        if known[command] and subcommand:
            assert subcommand in known[command], f"{page} names triptych {command} {subcommand}"


def settings() -> Iterator[tuple[str, str]]:
    for section, kind in SECTIONS.items():
        yield from ((section, key) for key in kind.model_fields)
    for objective in OBJECTIVES.values():
        yield from (("objective", key) for key in objective.model_fields)
    for config in configs.values():
        yield from (("model", one.name) for one in dataclasses.fields(config))


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_there(page: str) -> None:
    known = set(settings())
    sections = {section for section, _ in known}
    for section, key in SETTING.findall(text_of(page)):
        is_file = key in ("py", "yaml")
        assert section not in sections or is_file or (section, key) in known, f"{page} names {section}.{key}"
