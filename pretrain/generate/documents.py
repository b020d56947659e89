"""The documents of rows: what a run's data asks and answers. T time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.stream.batch import Batch
from data_pipelines.tokens.roles import CONDITION, STRUCTURE, TARGET, TASK_NAMES, read_roles
from data_pipelines.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Document:
    """One whole document.

    task: of TASK_NAMES.
    tokens_T: int64.
    role_T: as `data_pipelines.tokens.roles` names them.
    """

    task: str
    tokens_T: Tensor
    role_T: Tensor

    @property
    def condition(self) -> Tensor:
        """Its ids; none of free text."""
        return self.tokens_T[self.role_T == CONDITION]

    @property
    def target(self) -> Tensor:
        return self.tokens_T[self.role_T == TARGET]

    def blank(self, mask: int) -> list[int]:
        """The ids with every target [MASK]ed."""
        return self.tokens_T.masked_fill(self.role_T == TARGET, mask).tolist()


def documents_of(batches: Iterable[Batch], vocabulary: Vocabulary) -> Iterator[Document]:
    """All documents in batches of whole ones; padding is none."""
    for batch in batches:
        roles = read_roles(vocabulary, batch.tokens, batch.positions.long())
        for row, segment_ids_T in enumerate(batch.segment_ids):
            lengths = torch.unique_consecutive(segment_ids_T, return_counts=True)[1].tolist()
            tokens, roles_of = batch.tokens[row].split(lengths), roles.role[row].split(lengths)
            tasks = roles.task[row].split(lengths)
            for tokens_T, role_T, task_T in zip(tokens, roles_of, tasks, strict=True):
                if (role_T != STRUCTURE).any():
                    yield Document(TASK_NAMES[int(task_T[0])], tokens_T, role_T)
