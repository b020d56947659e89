"""How likely given documents are under a masked-diffusion model: the ELBO, and choices among answers.

With n tokens to score, k of them masked and k uniform over 1 ... n, the bound is
-log p(x) <= E_k E_mask [ (n / k) sum over masked i of -log p(x_i | the rest) ] (LLaDA, arXiv:2502.09992, section 2.4).
It is the continuous-time bound, whatever schedule the model was trained with; k is stratified over the draws.

Shape suffixes: D draws, N tokens to score, K of them masked, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.tokens.vocabulary import Vocabulary
from pretrain.errors import UserError
from pretrain.generate.canvas import Canvas
from pretrain.generate.diffusion import Denoiser, pad_rows

LOGIT_VALUES = 2**26
"""So many log probabilities at once, 512 MiB in float64, unless one row has more."""
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Answer:
    """A canvas and what truly stands in its masked places, from the left: (N,) int64."""

    canvas: Canvas
    tokens_N: Tensor


@dataclass(frozen=True)
class Estimate:
    """Nats of a whole answer, and half the width of the 95 % confidence interval.

    Draws are stratified, which makes the interval wider than it need be, never narrower.
    """

    nats: float
    half_width: float
    tokens: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


@dataclass(frozen=True)
class Masks:
    """Random masks of a question, the same for all of its answers: only what differs between answers should make
    their estimates differ.

    shares_D: in [0, 1), stratified; of n tokens 1 + floor(n share) are masked.
    ranks_DN: uniform numbers; the masked ones are those with the smallest.
    """

    shares_D: np.ndarray
    ranks_DN: np.ndarray

    @classmethod
    def draw(cls, draws: int, tokens: int, seed: int) -> Masks:
        """For answers of up to `tokens` tokens."""
        random = np.random.default_rng(seed)
        shares_D = (np.arange(draws) + random.random()) / draws
        return cls(shares_D, random.random((draws, tokens)))

    def places(self, draw: int, tokens: int) -> np.ndarray:
        """Which of an answer's tokens are masked in a draw, ascending."""
        count = min(tokens, 1 + math.floor(tokens * self.shares_D[draw]))
        return np.sort(np.argsort(self.ranks_DN[draw, :tokens], kind="stable")[:count])


class Likelihood:
    """Scores answers with a denoiser, without gradients."""

    def __init__(
        self, denoiser: Denoiser, vocabulary: Vocabulary, device: torch.device, rows_at_once: int = 32
    ) -> None:
        self._denoiser = denoiser
        self._vocabulary = vocabulary
        self._device = device
        self._rows_at_once = rows_at_once

    def negative_elbo(self, answer: Answer, masks: Masks) -> Estimate:
        """The negative ELBO in nats, estimated. Of one token it is exact: -log p. Raises ValueError for an empty
        answer."""
        tokens = _count(answer)
        draws = 1 if tokens == 1 else len(masks.shares_D)
        log_p = self._log_p([(answer, masks.places(draw, tokens)) for draw in range(draws)])
        nats_D = np.asarray([-tokens / len(some_K) * float(some_K.sum()) for some_K in log_p])
        spread = float(nats_D.std(ddof=1)) if draws > 1 else 0.0
        return Estimate(float(nats_D.mean()), NORMAL_95 * spread / math.sqrt(draws), tokens)

    def exact_negative_elbo(self, answer: Answer) -> Estimate:
        """The same from all 2^n - 1 masks. Raises ValueError for an empty answer."""
        tokens = _count(answer)
        places = [
            np.asarray(some)
            for k in range(1, tokens + 1)
            for some in itertools.combinations(range(tokens), k)
        ]
        log_p = self._log_p([(answer, some) for some in places])
        # (n / k) / (n times the number of masks of k)
        nats = [-float(some_K.sum()) / len(some_K) / math.comb(tokens, len(some_K)) for some_K in log_p]
        return Estimate(math.fsum(nats), 0.0, tokens)

    def confidence_nats(self, answer: Answer) -> Estimate:
        """-log p of the answer, token by token in the order in which the model is surest of a place, whatever
        stands there: one forward pass per token, and no randomness. Raises ValueError for an empty answer."""
        tokens = _count(answer)
        left, nats = np.arange(tokens), 0.0
        while len(left):
            log_p_KV = self._all_log_p([(answer, left)])[0]
            best = int(log_p_KV.max(-1).values.argmax())
            nats -= float(log_p_KV[best, int(answer.tokens_N[left[best]])])
            left = np.delete(left, best)
        return Estimate(nats, 0.0, tokens)

    def _log_p(self, questions: Sequence[tuple[Answer, np.ndarray]]) -> list[Tensor]:
        """For each answer with its masked places, log p of the true tokens there, (K,) float64 on the CPU."""
        found: list[Tensor] = []
        values = max(len(masked) for _, masked in questions) * self._vocabulary.size
        rows = min(self._rows_at_once, max(1, LOGIT_VALUES // values))
        for start in range(0, len(questions), rows):
            some = questions[start : start + rows]
            for (answer, masked), log_p_KV in zip(some, self._all_log_p(some), strict=True):
                truth_K = answer.tokens_N[torch.from_numpy(masked)]
                found.append(log_p_KV.gather(1, truth_K[:, None].to(log_p_KV.device))[:, 0].cpu())
        return found

    @torch.no_grad()
    def _all_log_p(self, questions: Sequence[tuple[Answer, np.ndarray]]) -> list[Tensor]:
        """For each answer with its masked places, log probabilities (K, V) there in float64, normalised over the ids
        that may stand at the place."""
        mask = self._vocabulary.mask
        rows, masked = [], []
        for answer, some in questions:
            blank_T = answer.canvas.tokens_T
            asked_N = (blank_T == mask).nonzero()[:, 0]
            masked.append(asked_N[torch.from_numpy(some)])
            rows.append(blank_T.index_put((asked_N,), answer.tokens_N).index_fill(0, masked[-1], mask))
        tokens_BT, segment_ids_BT, positions_BT = pad_rows(rows, self._vocabulary.pad)
        wanted_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for row, places in enumerate(masked):
            wanted_BT[row, places] = True
        batch = (tokens_BT, segment_ids_BT, positions_BT, wanted_BT)
        logits_NV = self._denoiser(*(tensor.to(self._device) for tensor in batch)).double()
        ranges = [answer.canvas.ranges_T2[some] for (answer, _), some in zip(questions, masked, strict=True)]
        ranges_N2 = torch.cat(ranges).to(self._device)
        ids_V = torch.arange(logits_NV.shape[1], device=self._device)
        possible_NV = (ids_V >= ranges_N2[:, :1]) & (ids_V < ranges_N2[:, 1:])
        log_p_NV = logits_NV.masked_fill(~possible_NV, -torch.inf).log_softmax(-1)
        return list(log_p_NV.split([len(some) for some in masked]))


def _count(answer: Answer) -> int:
    if len(answer.tokens_N) == 0:
        raise ValueError("the answer has no tokens to score")
    return len(answer.tokens_N)


@dataclass(frozen=True)
class Verdict:
    """Which choice a question got: the one of the fewest nats."""

    chosen: int
    estimates: tuple[Estimate, ...]


def choose(
    likelihood: Likelihood, answers: Sequence[Answer], *, by: str = "elbo", draws: int = 128, seed: int = 0
) -> Verdict:
    """The likeliest of several answers to one question.

    Args:
        by: "elbo", of `draws` masks that all answers share, and exact for an answer so short that all its masks are
            no more than that; or "confidence".
    """
    if by == "confidence":
        estimates = tuple(likelihood.confidence_nats(answer) for answer in answers)
    else:
        assert by == "elbo", by
        masks = Masks.draw(draws, max(len(answer.tokens_N) for answer in answers), seed)
        estimates = tuple(
            likelihood.exact_negative_elbo(answer)
            if 2 ** len(answer.tokens_N) <= draws + 1
            else likelihood.negative_elbo(answer, masks)
            for answer in answers
        )
    return Verdict(int(np.argmin([estimate.nats for estimate in estimates])), estimates)


@dataclass(frozen=True)
class Share:
    """Right ones of all, and the 95 % interval of the share (Wilson 1927)."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Raises UserError where nothing was counted."""
        if not self.count:
            raise UserError("there is no question to count")
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        z2 = NORMAL_95**2
        middle = (self.right + z2 / 2) / (self.count + z2)
        half = (
            NORMAL_95
            / (self.count + z2)
            * math.sqrt(self.right * (self.count - self.right) / self.count + z2 / 4)
        )
        return max(0.0, middle - half), min(1.0, middle + half)
