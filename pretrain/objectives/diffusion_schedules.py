"""Where mask ratios lie, and what a masked token weighs so that the sum is the likelihood bound.

A schedule is the distribution of the mask ratio r, by its cumulative function F. With n tokens of which k are masked,
or with each masked by itself with probability r, the bound in nats is

    NELBO = E_k~P [ w(k) sum_masked -log p(x | what is shown) ],   P(k) = F(k / n) - F((k - 1) / n),   w = 1 / (k P(k))
    NELBO = E_r~p [ w(r) sum_masked -log p(x | what is shown) ],   p = F',                             w = 1 / (r p(r))

which has the same value for every F (for the linear one, w is n / k and 1 / r; Sahoo et al., arXiv 2406.07524, in
the notation alpha = 1 - r). A schedule therefore chooses the variance, and, if the weight is left out, the objective.

All arrays are float64 of any one shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from pretrain.config.objective import ModalitySection

SMALLEST_RATIO = 1e-3
"""Bernoulli ratios below it are raised to it, and share its weight: 1 / r would have no finite variance. The masked
sum over r is smooth there, so the bound changes by a share of about 1e-3 of what one more shown token changes."""


@dataclass(frozen=True)
class Schedule:
    """The distribution of the mask ratio: r = u, cos(pi u / 2) or u^power for a uniform u."""

    kind: Literal["linear", "cosine", "polynomial"]
    power: float = 1.0

    def ratio(self, quantile: np.ndarray) -> np.ndarray:
        """F^-1: the ratio below which this share of the ratios lies."""
        if self.kind == "cosine":
            return np.sin(np.pi / 2 * quantile)
        return quantile**self._power

    def below(self, ratio: np.ndarray) -> np.ndarray:
        """F: the share of the ratios below this one."""
        if self.kind == "cosine":
            return np.arcsin(ratio) * (2 / np.pi)
        return ratio ** (1 / self._power)

    def density(self, ratio: np.ndarray) -> np.ndarray:
        """F'; infinite at the edge where it is."""
        with np.errstate(divide="ignore"):
            if self.kind == "cosine":
                return (2 / np.pi) / np.sqrt(1 - ratio**2)
            return ratio ** (1 / self._power - 1) / self._power

    @property
    def mean(self) -> float:
        """E[r]."""
        return 2 / np.pi if self.kind == "cosine" else 1 / (self._power + 1)

    @property
    def _power(self) -> float:
        return self.power if self.kind == "polynomial" else 1.0


LINEAR = Schedule("linear")


def schedule_of(section: ModalitySection) -> Schedule:
    return Schedule(section.schedule, section.power)


@dataclass(frozen=True)
class Drawn:
    """What documents drew. k counts the tokens masked in the first row of a pair, or r is their probability; in the
    second row of a complementary pair n - k, or 1 - r."""

    amount: np.ndarray  # k, as float64, or r
    elbo_weight: np.ndarray  # of each masked token of this row


def draw_counts(
    schedule: Schedule, quantile: np.ndarray, n: np.ndarray, second: np.ndarray, *, paired: bool
) -> Drawn:
    """Fixed counts of n >= 1 tokens.

    Of a complementary pair, both rows are samples of the bound, and the second never has all n masked; so a count
    weighs 2 / (k (P(k) + P(n - k))), as many draws as the pair has of it (the balance heuristic of Veach and Guibas
    1995), which keeps the pair's mean unbiased.
    """
    first = np.clip(np.ceil(n * schedule.ratio(quantile)), 1, n)
    masked = np.where(second, n - first, first)
    often = _probability(schedule, masked, n)
    if paired:
        often = (often + _probability(schedule, n - masked, n)) / 2
    weight = np.where(masked > 0, 1 / (np.maximum(masked, 1) * np.where(masked > 0, often, 1)), 0)
    return Drawn(first, weight)


def _probability(schedule: Schedule, k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """P(k), 0 for k = 0."""
    return np.where(k > 0, schedule.below(k / n) - schedule.below(np.maximum(k - 1, 0) / n), 0)


def draw_ratios(schedule: Schedule, quantile: np.ndarray, second: np.ndarray, *, paired: bool) -> Drawn:
    """Bernoulli probabilities, within [SMALLEST_RATIO, 1], or within 1 - SMALLEST_RATIO too in a pair.

    What lies beyond a limit is set to it and weighs what the interval beyond it should: with mass m at the limit e,
    1 / m at the lower and e / ((1 - e) m) at the upper one.
    """
    low = SMALLEST_RATIO
    high = 1 - low if paired else 1.0
    first = np.clip(schedule.ratio(quantile), low, high)
    own = np.where(second, 1 - first, first)
    density, mass = schedule.density(own), schedule.below(np.asarray(low))
    if paired:
        density = (density + schedule.density(1 - own)) / 2
        mass = (mass + 1 - schedule.below(np.asarray(high))) / 2
    at_low, at_high = first <= low, paired & (first >= high)
    weight = np.where(np.where(second, at_high, at_low), 1 / mass, 1 / (own * density))
    return Drawn(first, np.where(np.where(second, at_low, at_high), low / (high * mass), weight))


def training_weight(
    section: ModalitySection, schedule: Schedule, elbo_weight: np.ndarray, *, paired: bool
) -> np.ndarray:
    """The weight that the section asks for, without its scale. "none" is one over the mean ratio, so that the loss
    stays in nats per target token; the rows of a pair mask half of the tokens between them."""
    if section.weight == "none":
        return np.full_like(elbo_weight, 2.0 if paired else 1 / schedule.mean)
    return np.minimum(elbo_weight, section.clip) if section.weight == "clipped" else elbo_weight
