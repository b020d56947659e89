"""The config's objective section: one class per kind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.config.section import Section


class NextTokenSection(Section):
    kind: Literal["next_token"] = "next_token"
    z_loss: float = Field(default=0.0, ge=0, le=1)
    """Weight of log(Z)^2 per token, which keeps logits from drifting. 1e-4 is usual; 0 switches it off."""


class ModalitySection(Section):
    """How documents are corrupted and weighed whose target is of one modality."""

    schedule: Literal["linear", "cosine", "polynomial"] = "linear"
    """Where mask ratios lie: r = t, cos(pi t / 2) or t^power, with t uniform."""
    power: float = Field(default=2.0, ge=0.5, le=10)
    """polynomial only. Below 1, few masks are small, and those weigh much in the bound: at 1/2 up to n^2 for one of n
    tokens, and below that the reported bound would lack what is never drawn."""
    weight: Literal["elbo", "clipped", "none"] = "elbo"
    """Training weight of a masked token. elbo: the likelihood bound's; clipped: at most `clip` of it; none: the
    same for all, one over the mean mask ratio."""
    clip: float = Field(default=5.0, gt=0, le=1e6)
    """clipped only: 1 is the weight of a token when all are masked under the linear schedule."""
    scale: float = Field(default=1.0, ge=0, le=1e6)
    """Times the weight. Reported bounds are never scaled."""


class MaskedDiffusionSection(Section):
    kind: Literal["masked_diffusion"]
    condition: Literal["clean", "joint"] = "clean"
    """Of a pair X, Y. clean: X is shown and Y learned; joint: both are masked at one ratio, and learned."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """clean only: share of the pairs whose X is masked whole, as guidance needs it."""
    whole_modality: float = Field(default=0.0, ge=0, le=1)
    """joint only: share of the pairs of which X or Y is masked whole and only the other learned."""
    masking: Literal["fixed_count", "bernoulli"] = "fixed_count"
    """Mask a drawn number of a document's tokens, or each by itself with a drawn probability."""
    complementary: bool = False
    """Rows 2j and 2j + 1 hold the same documents, and what is masked in one is shown in the other."""
    evaluation_draws: int = Field(default=1, ge=1, le=65_536)
    """Mask draws per validation row."""
    text: ModalitySection = ModalitySection()
    image: ModalitySection = ModalitySection()
    audio: ModalitySection = ModalitySection()


ObjectiveSection = NextTokenSection | MaskedDiffusionSection

OBJECTIVES: dict[str, type[Section]] = {
    "next_token": NextTokenSection,
    "masked_diffusion": MaskedDiffusionSection,
}
