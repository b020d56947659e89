"""The mamba2 family: the linear recurrence that the ParaRNN paper compares with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.family import Family
from models.layers.cost import flops_per_token
from models.layers.language_model import LanguageModel
from models.layers.norm import RMSNorm
from models.layers.recipes import recipe
from models.mamba2.config import Mamba2Config
from models.mamba2.mixer import Block

# The ParaRNN paper's settings for it (table 3, section C.1), as for the pararnn family.
RECIPE: Mapping[str, Any] = {
    "lr": 5e-3,
    "matrix_lr_multiplier": 1.0,
    "betas": (0.9, 0.95),
    "epsilon": 1e-8,
    "weight_decay": 5e-7,
    "clip_norm": 1.0,
    "warmup_steps": 5500,
    "schedule": "cosine",
    "final_lr_fraction": 0.0,
}


def build(config: Mamba2Config) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    return LanguageModel(
        config,
        blocks=(Block(config) for _ in range(config.layers)),
        norm=RMSNorm(config.width, config.norm_epsilon),
        recipe=recipe(config.initialisation, config.layers),
    )


mamba2 = Family(
    name="mamba2",
    config=Mamba2Config,
    build=build,
    flops_per_token=flops_per_token,
    recipe=RECIPE,
)
