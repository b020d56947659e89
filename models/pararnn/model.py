"""The ParaRNN language model: its blocks and its recipe."""

from __future__ import annotations

from torch import nn

from models.layers.language_model import LanguageModel
from models.layers.norm import RMSNorm
from models.layers.recipes import recipe
from models.pararnn.config import ParaRNNConfig
from models.pararnn.mixer import Block, MixerBlock


def build(config: ParaRNNConfig) -> LanguageModel:
    """The network of a resolved config. With `block: mixer` there is no norm before the head."""
    full = config.block == "full"
    return LanguageModel(
        config,
        blocks=(Block(config) if full else MixerBlock(config) for _ in range(config.layers)),
        norm=RMSNorm(config.width, config.norm_epsilon) if full else nn.Identity(),
        recipe=recipe(config.initialisation, config.layers * (2 if config.hidden_width else 1)),
    )
