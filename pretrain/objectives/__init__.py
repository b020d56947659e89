"""Objectives by the name the config gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.config.objective import MaskedDiffusionSection
from pretrain.objectives.base import LossSum, Objective
from pretrain.objectives.masked_diffusion import MaskedDiffusion
from pretrain.objectives.next_token import NextToken

if TYPE_CHECKING:
    from data_pipelines.tokens.vocabulary import Vocabulary
    from pretrain.config import Config

__all__ = ["LossSum", "MaskedDiffusion", "NextToken", "Objective", "build_diffusion", "build_objective"]


def build_objective(config: Config, vocabulary: Vocabulary | None = None) -> Objective:
    """The config's objective. `vocabulary`: of the data, for masked diffusion."""
    if isinstance(config.objective, MaskedDiffusionSection):
        assert vocabulary is not None, "masked diffusion is for data with a vocabulary"
        return build_diffusion(config, vocabulary)
    return NextToken(z_loss=config.objective.z_loss)


def build_diffusion(config: Config, vocabulary: Vocabulary) -> MaskedDiffusion:
    """The config's objective where it is masked diffusion."""
    assert isinstance(config.objective, MaskedDiffusionSection)
    return MaskedDiffusion(config.objective, vocabulary, config.run.seed, config.model.position_axes)
