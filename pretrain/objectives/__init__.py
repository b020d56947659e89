"""Objectives by the name the config gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.objectives.base import LossSum, Objective
from pretrain.objectives.next_token import NextToken

if TYPE_CHECKING:
    from pretrain.config import ObjectiveSection

__all__ = ["LossSum", "NextToken", "Objective", "build_objective"]


def build_objective(section: ObjectiveSection) -> Objective:
    return {"next_token": NextToken}[section.kind](z_loss=section.z_loss)
