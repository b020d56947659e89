"""A document to fill in. T time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.tokens.roles import CONDITION, read_roles
from data_pipelines.tokens.vocabulary import MODALITIES, Modality, Vocabulary


@dataclass(frozen=True)
class Canvas:
    """One document, on the CPU.

    tokens_T: int64; [MASK] where a token is to be made.
    ranges_T2: int64, the first id and the one after the last that may stand at each [MASK].
    condition_T: bool, what guidance masks.
    """

    tokens_T: Tensor
    ranges_T2: Tensor
    condition_T: Tensor


def canvas(vocabulary: Vocabulary, tokens: Sequence[int]) -> Canvas:
    """A document as `data_pipelines.tokens.roles` knows them, some of its content [MASK]ed.

    A place takes ids of its own modality only, of several codebooks those of its level. Raises ValueError where
    something that is no content is masked.
    """
    tokens_T = torch.as_tensor(tokens, dtype=torch.int64)
    roles = read_roles(vocabulary, tokens_T[None], torch.arange(len(tokens_T))[None])
    modality_T, offset_T = roles.modality[0], roles.offset[0]
    ranges_T2 = torch.zeros(len(tokens_T), 2, dtype=torch.int64)
    for modality in vocabulary.modalities:
        its_T = modality_T == MODALITIES.index(modality.name)
        ranges_T2[its_T] = _ranges(modality, offset_T[its_T])
    lost = ((tokens_T == vocabulary.mask) & (ranges_T2[:, 1] == 0)).nonzero()[:, 0]
    if len(lost):
        raise ValueError(f"place {int(lost[0])} is [MASK] but stands in no modality's part of the document")
    return Canvas(tokens_T, ranges_T2, roles.role[0] == CONDITION)


def _ranges(modality: Modality, offset_N: Tensor) -> Tensor:
    """(N, 2): the ids of the level that each place of a part holds. In a delayed pattern, the last id of a level is
    the filling before its first frame and after its last, and stands there alone."""
    books = modality.codebooks
    level_size = modality.size // books
    level_N = offset_N % books
    first_N = modality.first + level_N * level_size
    end_N = first_N + level_size
    if modality.delay:
        frame_N = offset_N // books - level_N
        frames = len(offset_N) // books - books + 1
        filling_N = (frame_N < 0) | (frame_N >= frames)
        first_N = torch.where(filling_N, end_N - 1, first_N)
        end_N = torch.where(filling_N, end_N, end_N - 1)
    return torch.stack((first_N, end_N), dim=-1)
