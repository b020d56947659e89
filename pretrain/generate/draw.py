"""Drawing tokens for masked places, each among the ids that may stand there.

All in float64: with noise in 32 bits the largest Gumbel values are cut off, which acts like a lower temperature and
costs diversity (arXiv:2409.02908).

Shape suffixes: N masked places of one row, V vocabulary, R ids of one range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.generate.settings import SamplerSettings

CHUNK_VALUES = 2**24
"""At most about so many float64 values of logits at once: 128 MiB, a few times over."""


def draw(
    given_NV: Tensor,
    unconditional_NV: Tensor | None,
    ranges_N2: Tensor,
    settings: SamplerSettings,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A token for each place, (N,) int64, and how sure the model is of it, (N,) float64.

    Args:
        given_NV: logits given the condition.
        unconditional_NV: logits without the condition, for guidance.
        ranges_N2: first id and the one after the last that may stand at each place.
        random: on the logits' device.
    """
    tokens_N = torch.empty(len(given_NV), dtype=torch.int64, device=given_NV.device)
    scores_N = torch.empty(len(given_NV), dtype=torch.float64, device=given_NV.device)
    for first, end in ranges_N2.unique(dim=0).tolist():
        places = ((ranges_N2 == torch.tensor((first, end))).all(1)).nonzero()[:, 0].to(given_NV.device)
        for some in places.split(max(1, CHUNK_VALUES // (end - first))):
            logits_NR = given_NV[some, first:end].double()
            if unconditional_NV is not None:
                plain_NR = unconditional_NV[some, first:end].double()
                logits_NR = plain_NR + settings.guidance * (logits_NR - plain_NR)
            local_N = _draw_local(logits_NR, settings, random)
            tokens_N[some] = local_N + first
            scores_N[some] = log_score(settings.score, logits_NR, local_N)
    return tokens_N, scores_N


def gumbel_noise(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Standard Gumbel noise in float64, on the generator's device."""
    uniform = torch.rand(shape, generator=random, dtype=torch.float64, device=random.device)
    return -(-uniform.log()).log()


def log_score(score: str, logits_NR: Tensor, chosen_N: Tensor) -> Tensor:
    """How sure the model is of the chosen tokens, as a logarithm, (N,): log p of the token, log (p1 - p2) of the two
    most likely ones, minus the entropy in nats, or 0 for random."""
    if score == "random":
        return torch.zeros(len(logits_NR), dtype=torch.float64, device=logits_NR.device)
    log_p_NR = logits_NR.log_softmax(-1)
    if score == "max_probability":
        return log_p_NR.gather(1, chosen_N[:, None])[:, 0]
    if score == "entropy":
        return torch.special.entr(log_p_NR.exp()).sum(-1).neg()
    assert score == "margin", score
    if log_p_NR.shape[1] == 1:
        return torch.zeros_like(log_p_NR[:, 0])
    best_N2 = log_p_NR.exp().topk(2, dim=-1).values
    return (best_N2[:, 0] - best_N2[:, 1]).clamp(min=torch.finfo(torch.float64).tiny).log()


def _draw_local(logits_NR: Tensor, settings: SamplerSettings, random: torch.Generator) -> Tensor:
    """Places in the range, (N,): Gumbel-max after temperature and nucleus."""
    if settings.temperature == 0:
        return logits_NR.argmax(-1)
    logits_NR = logits_NR / settings.temperature
    if settings.top_p < 1:
        logits_NR = logits_NR.masked_fill(_outside_nucleus(logits_NR, settings.top_p), -torch.inf)
    noise_NR = gumbel_noise(tuple(logits_NR.shape), random)
    return (logits_NR + noise_NR).argmax(-1)


def _outside_nucleus(logits_NR: Tensor, top_p: float) -> Tensor:
    """True for what is not among the most likely ids that together have `top_p`; the first always is."""
    sorted_NR, order_NR = logits_NR.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_NR = sorted_NR.cumsum(-1) - sorted_NR
    before_NR[:, 0] = 0.0
    return torch.zeros_like(before_NR, dtype=torch.bool).scatter(1, order_NR, before_NR >= top_p)
