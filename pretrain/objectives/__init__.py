"""Objectives, which the config's section names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.own import named
from pretrain.objectives.base import LossSum, Objective

if TYPE_CHECKING:
    from data_pipelines.tokens.vocabulary import Vocabulary
    from pretrain.config import Config

__all__ = ["LossSum", "Objective", "build_objective"]


def build_objective(config: Config, vocabulary: Vocabulary | None = None) -> Objective:
    """The config's objective. `vocabulary`: of the data, for one that learns whole documents."""
    kind: type[Objective] = named(config.objective.objective)
    return kind.build(config, vocabulary)
