"""What the rest of the system knows of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.sharding import Split


@dataclass(frozen=True)
class Family:
    """One model family, as data and functions.

    config: a frozen dataclass with `family`, `problems(sequence_length)` and
        `resolved(vocabulary=, sequence_length=)`; and for layouts `division_problems(parts)`,
        `swap_problems(parts)` and `row_order`, as `models.layers.config.DecoderConfig` has them.
    build: a resolved config to the network, on the default device (meta too), its weights not yet drawn.
    sharding: module name pattern to split, over tensor-parallel ranks (`models.sharding`).
    flops_per_token: (config, sequence length) to training FLOPs, forward and backward.
    parameter_group: parameter name to "embedding", "attention" or "recurrence", "mlp", "norm" or "head".
    recipe: recommended settings of the optimizer.
    """

    name: str
    config: type
    build: Callable[[Any], nn.Module]
    sharding: Mapping[str, Split]
    flops_per_token: Callable[[Any, int], float]
    parameter_group: Callable[[str], str]
    recipe: Mapping[str, Any]
