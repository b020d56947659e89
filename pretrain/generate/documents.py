"""The documents of rows: what a run's data asks and answers. T time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.stream.batch import Batch
from data_pipelines.tokens.roles import CONDITION, STRUCTURE, TARGET, TASK_NAMES, read_layout
from data_pipelines.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Document:
    """One whole document.

    task: of TASK_NAMES.
    tokens_T: int64.
    part_T: as `data_pipelines.tokens.roles` names the parts.
    """

    task: str
    tokens_T: Tensor
    part_T: Tensor

    @property
    def condition(self) -> Tensor:
        """Its ids; none of free text."""
        return self.tokens_T[self.part_T == CONDITION]

    @property
    def target(self) -> Tensor:
        return self.tokens_T[self.part_T == TARGET]

    def blank(self, mask: int) -> list[int]:
        """The ids with every target [MASK]ed."""
        return self.tokens_T.masked_fill(self.part_T == TARGET, mask).tolist()


def documents_of(batches: Iterable[Batch], vocabulary: Vocabulary) -> Iterator[Document]:
    """All documents in batches of whole ones; padding is none."""
    for batch in batches:
        layout = read_layout(vocabulary, batch.tokens, batch.positions.long())
        for row, segment_ids_T in enumerate(batch.segment_ids):
            lengths = torch.unique_consecutive(segment_ids_T, return_counts=True)[1].tolist()
            tokens, parts = batch.tokens[row].split(lengths), layout.part[row].split(lengths)
            tasks = layout.task[row].split(lengths)
            for tokens_T, part_T, task_T in zip(tokens, parts, tasks, strict=True):
                if (part_T != STRUCTURE).any():
                    yield Document(TASK_NAMES[int(task_T[0])], tokens_T, part_T)
