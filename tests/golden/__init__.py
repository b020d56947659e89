"""Frozen values. `python -m tests.golden` renews the resolved configs; read the diff before committing it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = Path(__file__).parents[2] / "configs"

NO_RUNS = ("cluster/*.yaml", "*/recipe.yaml")
"""Settings of clusters, and what several runs extend."""


def runnable_configs() -> list[Path]:
    """Every shipped run."""
    others = {path for pattern in NO_RUNS for path in CONFIGS.glob(pattern)}
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path not in others)


def golden_path(config: Path) -> Path:
    name = "-".join(config.relative_to(CONFIGS).with_suffix("").parts)
    return FOLDER / "configs" / f"{name}.yaml"
