"""First weights, drawn from (seed, parameter name): the same for any layout, device and order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0. What falls beyond the limit, if there is one, is set to it."""

    deviation: float
    limit: float | None = None


@dataclass(frozen=True)
class Uniform:
    """From -bound to bound."""

    bound: float


@dataclass(frozen=True)
class LogOfUniform:
    """The logarithm of a number between `low` and `high`."""

    low: float
    high: float


@dataclass(frozen=True)
class SoftplusLogUniform:
    """A number whose softplus has its logarithm spread evenly between those of `low` and `high`."""

    low: float
    high: float


@dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float


Rule = Normal | Uniform | LogOfUniform | SoftplusLogUniform | Constant


class Initialisable(Protocol):
    """A model that knows how each of its parameters starts."""

    def initial_rule(self, name: str) -> Rule: ...


def initial_parameter(name: str, shape: Sequence[int], rule: Rule, seed: int) -> Tensor:
    """One whole parameter, fp32 on the CPU. A rank that holds a part of it takes its part of this."""
    with torch.device("cpu"):
        if isinstance(rule, Constant):
            return torch.full(tuple(shape), rule.value)
        key = blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        drawn = torch.empty(tuple(shape))
        if isinstance(rule, Normal):
            drawn.normal_(0.0, rule.deviation, generator=generator)
            return drawn if rule.limit is None else drawn.clamp_(-rule.limit, rule.limit)
        if isinstance(rule, Uniform):
            return drawn.uniform_(-rule.bound, rule.bound, generator=generator)
        if isinstance(rule, LogOfUniform):
            return drawn.uniform_(rule.low, rule.high, generator=generator).log_()
        values = drawn.uniform_(math.log(rule.low), math.log(rule.high), generator=generator).exp_()
        return values + torch.log(-torch.expm1(-values))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter of an unparallelised model, in place, in its own dtype and device."""
    rules: Initialisable = model  # type: ignore[assignment]  # every family's model has the method
    for name, parameter in model.named_parameters():
        drawn = initial_parameter(name, parameter.shape, rules.initial_rule(name), seed)
        parameter.copy_(drawn)
