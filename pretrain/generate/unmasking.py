"""One sample under way: which places the model is asked for next, and which of its answers stay.

All of it on the CPU in numpy, with random numbers of the sample's own, so that the order of places is the same on any
device and beside any other samples.

Shape suffixes: T time, N places that are asked for.
"""

from __future__ import annotations

import numpy as np

from pretrain.generate.canvas import Canvas
from pretrain.generate.plan import Step, plan_steps
from pretrain.generate.settings import SamplerSettings

Array = np.ndarray


class Unmasking:
    """A canvas being filled by its plan: `next_places`, then `fill`, until there are no more.

    tokens_T: as they are now.
    """

    def __init__(self, canvas: Canvas, mask: int, settings: SamplerSettings, seed: int) -> None:
        self.canvas = canvas
        self.tokens_T: Array = canvas.tokens_T.numpy().copy()
        self._mask = mask
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._made_T = np.flatnonzero(self.tokens_T == mask)
        self._plan = iter(plan_steps(len(self._made_T), settings))
        self._step: Step | None = None
        self._wanted = self._again = self._made_T[:0]

    def next_places(self) -> Array | None:
        """Go through the plan up to a step in which a token appears, and give the places to ask the model for.

        None when the plan is done; then no place is masked.
        """
        for step in self._plan:
            block = self._made_T[step.first : step.end]
            masked = self.tokens_T[block] == self._mask
            self._step = step
            self._wanted = self._choose(block[masked], step)
            self._again = self._choose_again(block[~masked], step)
            if len(self._wanted):
                return self._wanted
            self.tokens_T[self._again] = self._mask
        return None

    def fill(self, tokens_N: Array, scores_N: Array) -> None:
        """The model's answers for the places that `next_places` gave."""
        kept = self._keep(scores_N)
        self.tokens_T[self._wanted[kept]] = tokens_N[kept]
        self.tokens_T[self._again] = self._mask

    def _choose(self, masked: Array, step: Step) -> Array:
        """The masked places in which a token is to appear, or all where it is the model's confidence that decides."""
        if self._settings.sampler == "confidence" or len(masked) == 0:
            return masked if len(masked) > step.masked_after else masked[:0]
        if self._settings.sampler == "first_hitting":
            chosen = self._random.integers(len(masked))
            return masked[chosen : chosen + 1]
        return masked[self._random.random(len(masked)) < unmask_probability(step, self._settings)]

    def _choose_again(self, made: Array, step: Step) -> Array:
        if self._settings.remask == 0:
            return made[:0]
        return made[self._random.random(len(made)) < remask_probability(step, self._settings)]

    def _keep(self, scores_N: Array) -> Array:
        """Which of the answers stay, as indices: all, or as many of the best scores as the plan has it."""
        assert self._step is not None
        if self._settings.sampler != "confidence":
            return np.arange(len(scores_N))
        # A random order is the order of equal scores with noise, at whatever scale.
        scale = 1.0 if self._settings.score == "random" else self._step.gumbel
        if scale:
            scores_N = scores_N + scale * self._random.gumbel(size=len(scores_N))
        best_first: Array = np.argsort(-scores_N, kind="stable")
        return best_first[: len(scores_N) - self._step.masked_after]


def unmask_probability(step: Step, settings: SamplerSettings) -> float:
    """Of a masked token in an ancestral step from t to s: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), with sigma
    the probability of masking again (ReMDM, arXiv:2503.00307); without it (alpha_s - alpha_t) / (1 - alpha_t)."""
    alpha_t, alpha_s = 1 - step.before, 1 - step.after
    sigma = remask_probability(step, settings)
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


def remask_probability(step: Step, settings: SamplerSettings) -> float:
    """settings.remask, but never so much that the schedule could not be kept: in ancestral sampling at most
    (1 - alpha_s) / alpha_t, and 0 in the last step of a block."""
    if step.after == 0:
        return 0.0
    if settings.sampler == "confidence" or step.before == 1:
        return settings.remask
    return min(settings.remask, step.after / (1 - step.before))
