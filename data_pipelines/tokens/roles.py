"""The role of each token of a packed row: its modality, its task, and whether it is given or to be made.

A row is self-describing. A pair is `<task> <begin X> x ... <end X> <begin Y> y ... <end Y>`: X is the condition,
Y the target. A document without a task token is text, all of it target. Masked tokens are recognised by what
surrounds them, so a row means the same before and after corruption.

Shape suffixes: B rows, T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.tokens.vocabulary import MODALITIES, SPECIALS, TASKS, Vocabulary

STRUCTURE, CONDITION, TARGET = 0, 1, 2
"""The roles: task token, boundaries and padding; what is given; what is to be made."""
NO_MODALITY = len(MODALITIES)
FREE_TEXT = 0
"""The task number of a document without a task token; the others are 1 + their place in TASKS."""
TASK_NAMES = ("text", *TASKS)


@dataclass(frozen=True)
class Roles:
    """All (B, T).

    role: uint8, STRUCTURE, CONDITION or TARGET.
    modality: uint8, place in MODALITIES, or NO_MODALITY for structure.
    task: uint8, place in TASK_NAMES, for every token of a document.
    offset: int64, tokens since the condition or the target began; 0 for structure.
    """

    role: Tensor
    modality: Tensor
    task: Tensor
    offset: Tensor


def read_roles(vocabulary: Vocabulary, tokens_BT: Tensor, positions_BT: Tensor) -> Roles:
    """The roles of the tokens of rows.

    Args:
        tokens_BT: int64 ids, some of them perhaps [MASK].
        positions_BT: tokens since the document began; 0 begins a document.
    """
    first = vocabulary.first_special
    special_BT = (tokens_BT - first).clamp(min=-1)  # place in SPECIALS, -1 for content
    place_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)
    start_BT = place_BT - positions_BT
    opens_BT = _is_one_of(special_BT, [f"<begin {name}>" for name in MODALITIES])
    opened_BT = opens_BT.cumsum(1)
    # Boundaries opened in this document, and where the newest of them is.
    before_BT = (opened_BT - opens_BT.long()).gather(1, start_BT)
    opened_BT = opened_BT - before_BT
    opening_BT = torch.where(opens_BT, place_BT, -1).cummax(1).values
    content_BT = (special_BT < 0) | (special_BT == SPECIALS.index("[MASK]"))
    task_BT = _task_of(special_BT.gather(1, start_BT))
    free_BT = task_BT == FREE_TEXT
    within_BT = content_BT & ~free_BT & (opened_BT > 0)
    role_BT = torch.where(within_BT, opened_BT.clamp(max=TARGET), STRUCTURE)
    role_BT = torch.where(free_BT & content_BT, TARGET, role_BT)
    opening_kind_BT = special_BT.gather(1, opening_BT.clamp(min=0))
    modality_BT = (opening_kind_BT - SPECIALS.index("<begin text>")) // 2
    modality_BT = torch.where(free_BT, MODALITIES.index("text"), modality_BT)
    modality_BT = torch.where(role_BT == STRUCTURE, NO_MODALITY, modality_BT)
    offset_BT = torch.where(free_BT, positions_BT.long(), place_BT - opening_BT - 1)
    offset_BT = torch.where(role_BT == STRUCTURE, 0, offset_BT)
    return Roles(role_BT.to(torch.uint8), modality_BT.to(torch.uint8), task_BT.to(torch.uint8), offset_BT)


def grid_positions(vocabulary: Vocabulary, roles: Roles, positions_BT: Tensor) -> Tensor:
    """(B, T, 2) int64: positions on two axes.

    A token of an image has its row and its column, counted from where the image begins; every other token has its
    place in the document on both axes, which is rotary embedding in one dimension.
    """
    positions_BT = positions_BT.long()
    both_BT2 = positions_BT[..., None].expand(*positions_BT.shape, 2)
    if vocabulary.image is None or vocabulary.image.grid is None:
        return both_BT2.contiguous()
    columns = vocabulary.image.grid[1]
    is_image_BT = roles.modality == MODALITIES.index("image")
    begin_BT = positions_BT - roles.offset
    image_BT2 = torch.stack((begin_BT + roles.offset // columns, begin_BT + roles.offset % columns), dim=-1)
    return torch.where(is_image_BT[..., None], image_BT2, both_BT2)


def _is_one_of(special_BT: Tensor, names: list[str]) -> Tensor:
    places = torch.tensor([SPECIALS.index(name) for name in names], device=special_BT.device)
    return torch.isin(special_BT, places)


def _task_of(special_BT: Tensor) -> Tensor:
    """Task numbers of documents, from their first tokens."""
    first = SPECIALS.index(f"<{next(iter(TASKS))}>")
    return torch.where(special_BT >= first, special_BT - first + 1, FREE_TEXT)
