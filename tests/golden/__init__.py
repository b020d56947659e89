"""Frozen values. `python -m tests.golden` renews the resolved configs; read the diff before committing it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = Path(__file__).parents[2] / "configs"


RUNS = ("sigmoid", "softmax", "pararnn/gru", "pararnn/lstm", "mamba2", "tasks", "trimodal")


def runnable_configs() -> list[Path]:
    """Every shipped run: configs/<family>/<size>.yaml, or configs/<family>/<kind>/<size>.yaml."""
    return sorted(path for folder in RUNS for path in (CONFIGS / folder).glob("*.yaml"))


def golden_path(config: Path) -> Path:
    name = "-".join(config.relative_to(CONFIGS).with_suffix("").parts)
    return FOLDER / "configs" / f"{name}.yaml"
