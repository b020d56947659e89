"""The pararnn family: nonlinear GRU and LSTM language models, trained in parallel over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.family import Family
from models.pararnn.cells import CELLS
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


def flops_per_token(config: ParaRNNConfig, sequence_length: int) -> float:
    """Training FLOPs per token: three times the forward's matrix products, at 2 FLOPs per multiply-add.

    Not counted are norms, the embedding's lookup, the convolution, and the recurrence, which multiplies no
    matrices: some tens of operations per channel and Newton iteration.
    """
    assert config.vocabulary is not None
    projections = 3 * config.width**2 if config.block == "full" else 0
    gates = CELLS[config.cell].gates * config.width**2 / config.heads
    mlp = 3 * config.width * config.hidden_width
    forward = 2 * (config.layers * (projections + gates + mlp) + config.width * config.vocabulary)
    return 3.0 * forward


pararnn = Family(
    name="pararnn",
    config=ParaRNNConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=RECIPE,
)
