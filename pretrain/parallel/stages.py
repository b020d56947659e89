"""The blocks of a model dealt out to the pipeline's ranks, and the parts of the model that come of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from models import families
from models.layers.language_model import LanguageModel, part
from pretrain.checkpoint.fragments import Placement
from pretrain.parallel.parallelize import parallelize

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.parallel.context import SharedSequences
    from pretrain.parallel.mesh import Mesh

TIED_HEAD, EMBEDDING = "head.weight", "embedding.weight"


@dataclass(frozen=True)
class Part:
    """One run of blocks on this rank, with what comes before the first block and after the last.

    names: each parameter's name in the plain model, by its name in `model`. They differ for a tied head whose
        embedding is on another rank.
    placements: by the plain model's names.
    sequences: which positions of a batch this rank computes, the same in all of its parts.
    """

    model: LanguageModel
    names: dict[str, str]
    placements: dict[str, Placement]
    sequences: SharedSequences
    is_first: bool
    is_last: bool

    @property
    def copies(self) -> set[str]:
        """The parameters here, by the plain model's names, that another rank has too and answers for."""
        return {EMBEDDING} if self.names.get(TIED_HEAD) == EMBEDDING else set()


def blocks_of_stages(layers: int, stages: int) -> list[range]:
    """Consecutive blocks for each stage. Where they do not divide, earlier stages have one more, and the last, which
    has the head too, one less.

    Raises ValueError where a stage would have none.
    """
    if layers < stages:
        raise ValueError(f"{layers} blocks cannot be shared by {stages} stages: each needs one")
    each, more = divmod(layers, stages)
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + each + (stage < more))
    return [range(first, end) for first, end in itertools.pairwise(ends)]


def whole_model(config: Config) -> LanguageModel:
    """The plain model without memory, on meta."""
    with torch.device("meta"):
        model: LanguageModel = families[config.model.family].build(config.model)
    return model


def build_parts(config: Config, mesh: Mesh, device: torch.device) -> list[Part]:
    """This rank's parts with their initial weights, one per chunk of the schedule, in the order of the blocks.

    The i-th chunk of the r-th rank is stage i x ranks + r. No rank ever holds the whole model.
    """
    chunks = config.parallel.pipeline_chunks
    stages = blocks_of_stages(config.model.layers, mesh.pipeline.size * chunks)
    own = [chunk * mesh.pipeline.size + mesh.pipeline.rank for chunk in range(chunks)]
    return [_build_part(config, mesh, device, stages, stage) for stage in own]


def _build_part(config: Config, mesh: Mesh, device: torch.device, stages: list[range], stage: int) -> Part:
    is_first, is_last = stage == 0, stage == len(stages) - 1
    model = whole_model(config)
    part(model, stages[stage], first=is_first, last=is_last)
    is_tied = bool(getattr(config.model, "tied_head", False))
    aliases = {TIED_HEAD: EMBEDDING} if is_tied and is_last and not is_first else {}
    parallelized = parallelize(
        model,
        mesh,
        config.parallel,
        device=device,
        seed=config.run.seed,
        aliases=aliases,
    )
    names = {name: aliases.get(name, name) for name, _ in model.named_parameters()}
    placements = {names[name]: parallelized.placements[name] for name in names}
    return Part(model, names, placements, parallelized.sequences, is_first, is_last)
