"""What no model's settings exceed: a value beyond is a typing error, which would fail late, or take all memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Problem = tuple[str, str]

LIMITS: Mapping[str, tuple[float, float]] = {
    "layers": (1, 4096),
    "width": (1, 262_144),
    "heads": (1, 16_384),
    "kv_heads": (1, 16_384),
    "vocabulary": (1, 16_777_216),
    "mlp_width": (0, 1_048_576),
    "rope_base": (1e-6, 1e12),
    "layer_scale": (1e-12, 100),
    "norm_epsilon": (1e-30, 0.1),
    "attention_bias": (-1000, 1000),
    "expand": (1, 64),
    "state_width": (1, 16_384),
    "groups": (1, 16_384),
    "conv_width": (1, 1024),
    "chunk": (1, 65_536),
    "recurrent_clip": (1e-12, 100),
    "transfer.width": (1, 262_144),
    "transfer.layers": (1, 4096),
    "transfer.alpha": (0, 1),
    "newton.iterations": (1, 1000),
    "newton.max_iterations": (1, 1000),
    "newton.tolerance": (0, 100),
    "newton.limit": (1e-12, 100),
    "newton.window": (1, 16_777_216),
}
"""Of every setting that is a number: the least and the most, whatever the family."""


def numbers_in(config: Any, prefix: str = "") -> dict[str, float]:
    """The settings of a model that are numbers, those of nested settings by a dotted key."""
    found: dict[str, float] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= numbers_in(value, f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    return found


def limits_of(key: str) -> tuple[float, float]:
    """Of a setting; of one within a mixer's settings (`sigmoid.heads`) by its own name."""
    unlimited = (-float("inf"), float("inf"))
    return LIMITS.get(key) or LIMITS.get(key.partition(".")[2], unlimited)


def beyond_limits(config: Any) -> list[Problem]:
    """(key, what would be right) of every number outside of its limits."""
    found = []
    for key, value in numbers_in(config).items():
        least, most = limits_of(key)
        if not least <= value <= most:
            found.append((key, f"must be from {_shown(least)} to {_shown(most)}"))
    return found


def too_large(config: Any) -> bool:
    """Whether a number is above its limit."""
    return any(value > limits_of(key)[1] for key, value in numbers_in(config).items())


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
