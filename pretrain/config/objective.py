"""The config's objective section: one class per kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from pretrain.config.data import DataSection
from pretrain.config.section import Problem, Section


class ObjectiveSection(Section):
    """What the settings of every objective say. One of your own is a subclass, which `objective.kind` names as
    `module:Class`.

    objective: "module:Class" of the `pretrain.objectives.base.Objective`; imported when a run opens.
    rows: of what it learns: "cut" from the documents of tokens one after the other (or drawn, for a task), or "whole"
        documents, whose tokens have a vocabulary of several modalities.
    scores_text: whether its loss is the nats of each token given those before it, so that bits per byte follow.
    """

    kind: str
    objective: ClassVar[str]
    rows: ClassVar[Literal["cut", "whole"]] = "cut"
    scores_text: ClassVar[bool] = False

    def problems(self, model: Any, data: DataSection) -> Iterator[Problem]:
        """What cannot be with these settings. model: the settings of the model (`models.configs`)."""
        yield from ()


class NextTokenSection(ObjectiveSection):
    objective: ClassVar[str] = "pretrain.objectives.next_token:NextToken"
    scores_text: ClassVar[bool] = True

    kind: Literal["next_token"] = "next_token"
    z_loss: float = Field(default=0.0, ge=0, le=1)
    """Weight of log(Z)^2 per token, which keeps logits from drifting. 1e-4 is usual; 0 switches it off."""

    def problems(self, model: Any, data: DataSection) -> Iterator[Problem]:
        if not model.causal:
            message = f"a {model.family} model sees the token it is to predict; use masked_diffusion"
            yield Problem("objective.kind", message, self.kind, True)


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


class MaskedDiffusionSection(ObjectiveSection):
    objective: ClassVar[str] = "pretrain.objectives.masked_diffusion:MaskedDiffusion"
    rows: ClassVar[Literal["cut", "whole"]] = "whole"

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

    def problems(self, model: Any, data: DataSection) -> Iterator[Problem]:
        if model.causal:
            message = (
                f"a {model.family} model does not see what follows a masked token; use model.family=trimodal"
            )
            yield Problem("objective.kind", message, self.kind, True)
        if self.complementary and data.global_batch_rows % 2:
            message = "complementary masks pair the rows of a step: use an even number"
            yield Problem("data.global_batch_rows", message, data.global_batch_rows, True)
        if self.condition == "clean" and self.whole_modality:
            message = "only objective.condition=joint has it; use condition_dropout, or set 0"
            yield Problem("objective.whole_modality", message, self.whole_modality, True)


def _by_kind(*sections: type[ObjectiveSection]) -> Mapping[str, type[ObjectiveSection]]:
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


OBJECTIVES = _by_kind(NextTokenSection, MaskedDiffusionSection)
"""The project's own, by the name that `objective.kind` gives them."""
