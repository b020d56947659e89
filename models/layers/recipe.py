"""The optimizer settings that Apple's sigmoid and softmax language models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Matrices train at lr * min(matrix_lr_width / width, 1); the embedding and the norms at lr.
# Weight decay follows the schedule, not the learning rate.
DECODER_RECIPE: Mapping[str, Any] = {
    "lr": 0.01,
    "matrix_lr_width": 768,
    "betas": (0.9, 0.95),
    "epsilon": 1e-8,
    "weight_decay": 1e-4,
    "clip_norm": 1.0,
    "warmup_steps": 5000,
    "schedule": "cosine",
    "final_lr_fraction": 0.1,
}
