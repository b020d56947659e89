"""The code, config and environment of a run as they were when it was launched: every attempt runs these."""

from __future__ import annotations

import compileall
import platform
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from launch.job import LaunchedRun
from pretrain.config import Config
from pretrain.json_text import to_json

PACKAGES = ("kernels", "models", "data_pipelines", "pretrain", "launch")
GIT_TIMEOUT_S = 30


def take_snapshot(run: LaunchedRun, config: Config) -> None:
    """Copy the packages, and write down the commit, what differed from it, the libraries and the config."""
    source = Path(__file__).resolve().parent.parent
    if run.code.exists():
        shutil.rmtree(run.code)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / package, run.code / package, ignore=ignore)
    compileall.compile_dir(run.code, quiet=1)  # once here, and not by every rank of every attempt
    folder = run.code.parent
    (folder / "commit.txt").write_text(_git(source, "rev-parse", "HEAD"), encoding="utf-8")
    (folder / "dirty.diff").write_text(_git(source, "diff", "HEAD"), encoding="utf-8")
    (folder / "environment.json").write_text(to_json(environment(), indent=1), encoding="utf-8")
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(config.to_yaml(), encoding="utf-8")


def environment() -> dict[str, object]:
    libraries = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "python": sys.version,
        "executable": sys.executable,
        "host": platform.node(),
        "platform": platform.platform(),
        "libraries": dict(sorted(libraries.items())),
    }


def _git(folder: Path, *arguments: str) -> str:
    """git's answer; empty where the packages are no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
