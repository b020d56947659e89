"""The pararnn family: nonlinear GRU and LSTM language models, trained in parallel over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.family import Family
from models.layers.cost import flops_per_token
from models.pararnn.config import ParaRNNConfig
from models.pararnn.model import build

# Section C.1 and tables 3 and 4 of the paper. It has one learning rate for all parameters, and decays by
# lr x 1e-3 (400M) or lr x 1e-4 per step; clipping and the betas are not stated.
RECIPE: Mapping[str, Any] = {
    "lr": 3e-3,
    "matrix_lr_multiplier": 1.0,
    "betas": (0.9, 0.95),
    "epsilon": 1e-8,
    "weight_decay": 3e-7,
    "clip_norm": 1.0,
    "warmup_steps": 5500,
    "schedule": "cosine",
    "final_lr_fraction": 0.0,
}


pararnn = Family(
    name="pararnn",
    config=ParaRNNConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=RECIPE,
)
