"""What the rest of the system knows of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.layers.language_model import LanguageModel


@dataclass(frozen=True)
class Family:
    """One model family, as data and functions.

    config: a frozen dataclass with `family`, `problems(sequence_length)` and
        `resolved(vocabulary=, sequence_length=)`; and for layouts `division_problems(parts)`,
        `swap_problems(parts)` and `row_order`, as `models.layers.config.DecoderConfig` has them.
    build: a resolved config to the network, on the default device (meta too), its weights not yet drawn.
    flops_per_token: (config, sequence length) to training FLOPs, forward and backward.
    recipe: recommended settings of the optimizer.
    """

    name: str
    config: type
    build: Callable[[Any], LanguageModel]
    flops_per_token: Callable[[Any, int], float]
    recipe: Mapping[str, Any]
