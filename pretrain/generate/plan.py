"""The steps of one sample: which of its places each step works on, and how many are still masked after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.generate.settings import SamplerSettings


@dataclass(frozen=True)
class Step:
    """first, end: the places it works on, counted among those that are to be made.

    before, after: shares of them that are masked, as the schedule has it (1 - alpha).
    masked_after: how many of them are masked after it, for a sampler that counts.
    gumbel: scale of the noise on the scores.
    """

    first: int
    end: int
    before: float
    after: float
    masked_after: int
    gumbel: float


def plan_steps(tokens: int, settings: SamplerSettings) -> list[Step]:
    """The steps that make `tokens` tokens, block by block."""
    size = tokens if settings.block is None else settings.block
    blocks = [(first, min(first + size, tokens)) for first in range(0, tokens, max(size, 1))]
    steps = settings.steps_for(tokens)
    return [step for block in blocks for step in _block_steps(*block, settings, _share(steps, block, tokens))]


def _share(steps: int, block: tuple[int, int], tokens: int) -> int:
    """A block's part of the steps: by its length, at least one."""
    first, end = block
    return max(1, steps * end // tokens - steps * first // tokens)


def _block_steps(first: int, end: int, settings: SamplerSettings, steps: int) -> list[Step]:
    tokens = end - first
    if settings.sampler == "confidence" and not settings.remask:
        steps = min(steps, tokens)
    ratios = [mask_ratio(settings.schedule, number / steps) for number in range(steps + 1)]
    counts = masked_counts(tokens, ratios)
    return [
        Step(
            first,
            end,
            before=ratios[number],
            after=ratios[number + 1],
            masked_after=counts[number + 1],
            # Of the scale itself each time: a scale that is multiplied step by step would fall much faster.
            gumbel=settings.gumbel * (1 - (number + 1) / steps),
        )
        for number in range(steps)
    ]


def mask_ratio(schedule: str, progress: float) -> float:
    """The share that is masked at `progress` from 0 to 1: 1 - progress, or cos(pi/2 progress) (MaskGIT,
    arXiv:2202.04200)."""
    if progress >= 1:
        return 0.0  # cos(pi/2) is not quite 0
    return 1 - progress if schedule == "linear" else math.cos(math.pi / 2 * progress)


def masked_counts(tokens: int, ratios: list[float]) -> list[int]:
    """How many of `tokens` are masked at each ratio: one fewer at least after every step while there are any, if there
    are no more steps than tokens."""
    counts = [tokens]
    fewer = int(len(ratios) - 1 <= tokens)
    for ratio in ratios[1:]:
        # 1e-9: a share like 3 * (1 - 2/3) that rounds to just below 1 is meant to be 1.
        counts.append(max(0, min(math.floor(tokens * ratio + 1e-9), counts[-1] - fewer)))
    return counts
