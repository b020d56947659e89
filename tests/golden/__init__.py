"""Frozen values. `python -m tests.golden` renews the resolved configs; read the diff before committing it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = Path(__file__).parents[2] / "configs"


def runnable_configs() -> list[Path]:
    """Every shipped run: configs/<family>/<size>.yaml."""
    return sorted(path for family in ("sigmoid", "softmax") for path in (CONFIGS / family).glob("*.yaml"))


def golden_path(config: Path) -> Path:
    return FOLDER / "configs" / f"{config.parent.name}-{config.stem}.yaml"
