"""How long documents are: whether the pairs of all datasets fit into a row, and how long targets are, given captions.

Read from stored shards, without rows. D documents, N tokens, S specials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import OpenSource
from data_pipelines.storage.dataset import Shard
from data_pipelines.tokens.document_form import PAIR_SPECIALS, check_pairs, member_documents, token_members
from data_pipelines.tokens.roles import TASK_NAMES
from data_pipelines.tokens.vocabulary import SPECIALS, TASKS, Vocabulary

FEW = 5
"""A caption that stands for fewer documents says too little by itself."""
SEEN_CAPTIONS, MOST_CAPTIONS = 100_000, 10_000
"""Different captions that are counted, and kept: where there are more, hardly any comes FEW times."""


def refuse_long_pairs(sources: Sequence[OpenSource], vocabulary: Vocabulary, length: int) -> None:
    """Raises DataError where pairs of some datasets do not fit into rows of `length` tokens: it names the longest of
    each and the length that holds all of them."""
    longest: dict[Path, int] = {}
    most, example = length, ""
    for source in sources:
        if source.dataset.ranges is not None:
            found, where = _longest_pair(source, vocabulary, length)
            if found > length:
                longest[source.dataset.path] = max(found, longest.get(source.dataset.path, 0))
            if found > most:
                most, example = found, where
    if longest:
        listed = ", ".join(f"{found} in {path}" for path, found in longest.items())
        raise DataError(
            f"data.sequence_length = {length}: the longest pairs have {listed} tokens, and pairs are not cut. Set "
            f"data.sequence_length to at least {most} ({example}), or leave such pairs out of the datasets."
        )


def _longest_pair(source: OpenSource, vocabulary: Vocabulary, above: int) -> tuple[int, str]:
    """Tokens of the longest document that is a pair and has more than `above`, and where it is."""
    best, place = 0, ""
    for record in source.dataset.split(source.split).shards:
        shard = Shard(source.dataset, record)
        index = shard.index()
        first_D = index.first_piece_D1[:-1].astype(np.int64)
        if not len(first_D):
            continue
        length_D = np.add.reduceat(index.piece_length_P.astype(np.int64), first_D)
        candidates = np.flatnonzero(length_D > max(above, best))
        if not len(candidates):
            continue
        tokens = shard.open().tokens
        for document in candidates[np.argsort(-length_D[candidates], kind="stable")].tolist():
            if int(tokens[int(index.piece_start_P[first_D[document]])]) >= vocabulary.first_special:
                best, place = int(length_D[document]), f"{shard.path} (document {document})"
                break
    return best, place


@dataclass
class TargetLengths:
    """How many documents of each task had so many target tokens, end-of-text included.

    tasks: by task (of TASK_NAMES) and length.
    by_tokens: of tasks that make sounds from text: by task, tokens of the caption, and length.
    by_caption: the same by the caption's ids; only captions of FEW documents or more.
    """

    tasks: dict[str, Counter[int]] = field(default_factory=dict)
    by_tokens: dict[str, dict[int, Counter[int]]] = field(default_factory=dict)
    by_caption: dict[str, dict[tuple[int, ...], Counter[int]]] = field(default_factory=dict)

    def add(self, task: str, caption: tuple[int, ...] | None, length: int) -> None:
        """Count one document."""
        self.tasks.setdefault(task, Counter())[length] += 1
        if caption is not None:
            self.by_tokens.setdefault(task, {}).setdefault(len(caption), Counter())[length] += 1
            captions = self.by_caption.setdefault(task, {})
            if caption in captions or len(captions) < SEEN_CAPTIONS:
                captions.setdefault(caption, Counter())[length] += 1

    def thinned(self) -> TargetLengths:
        """The same with the captions that say something: the most frequent ones."""
        kept = {
            task: dict(
                sorted(
                    ((caption, counts) for caption, counts in found.items() if counts.total() >= FEW),
                    key=lambda item: -item[1].total(),
                )[:MOST_CAPTIONS]
            )
            for task, found in self.by_caption.items()
        }
        return TargetLengths(self.tasks, self.by_tokens, kept)


def target_lengths(sources: Sequence[OpenSource], vocabulary: Vocabulary, row: int) -> TargetLengths:
    """Of all documents in the splits of some sources; text longer than a row of `row` tokens comes in pieces.

    Raises:
        DataError: damage.
    """
    found = TargetLengths()
    for source in sources:
        for task, caption, length in _targets(source, vocabulary):
            if task == TASK_NAMES[0]:
                for begin in range(0, length, row):
                    found.add(task, None, min(row, length - begin))
            else:
                found.add(task, caption, length)
    return found.thinned()


def _targets(source: OpenSource, vocabulary: Vocabulary) -> Iterator[tuple[str, tuple[int, ...] | None, int]]:
    """(task, ids of the caption where a sound is made of one, target tokens) of each document."""
    if source.dataset.ranges is None:
        for record in source.dataset.split(source.split).shards:
            index = Shard(source.dataset, record).index()
            lengths = np.add.reduceat(
                index.piece_length_P.astype(np.int64), index.first_piece_D1[:-1].astype(np.int64)
            )
            yield from ((TASK_NAMES[0], None, length) for length in lengths.tolist())
        return
    first_task = SPECIALS.index(f"<{next(iter(TASKS))}>")
    tasks = list(TASKS)
    for record in source.dataset.split(source.split).shards:
        opened = Shard(source.dataset, record).open()
        for member in token_members(opened):
            opened.check(member)
            documents = member_documents(opened, member)
            check_pairs(documents, vocabulary)
            for begin, length in zip(documents.begin_D.tolist(), documents.length_D.tolist(), strict=True):
                ids = documents.tokens_N[begin : begin + length]
                places = np.flatnonzero(ids >= vocabulary.first_special)
                if len(places) != PAIR_SPECIALS:
                    yield TASK_NAMES[0], None, length
                    continue
                task = tasks[int(ids[0]) - vocabulary.first_special - first_task]
                made = int(places[4] - places[3] - 1)
                sounds = TASKS[task] == ("text", "audio")
                yield task, tuple(ids[2 : places[2]].tolist()) if sounds else None, made
