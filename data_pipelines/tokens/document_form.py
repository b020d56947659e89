"""Whether the documents of a dataset are what its vocabulary says: text, or pairs of two modalities.

All documents of a member are checked at once. D documents, N tokens, S specials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage.dataset import OpenShard
from data_pipelines.storage.index import TOKEN_EXTENSIONS
from data_pipelines.tokens.vocabulary import SPECIALS, TASKS, Modality, Vocabulary

PAIR_SPECIALS = 5
"""`<task> <begin X> x ... <end X> <begin Y> y ... <end Y>`."""
REPAIR = "Build the dataset again."


@dataclass(frozen=True)
class Documents:
    """Documents that lie one after the other.

    where: the shard, for messages.
    first: number of the first one in its shard.
    """

    where: str
    first: int
    tokens_N: np.ndarray  # int64
    begin_D: np.ndarray  # places in `tokens_N`
    length_D: np.ndarray

    def name(self, document: int) -> str:
        return f"{self.where}: document {self.first + document}"


def token_members(opened: OpenShard) -> list[int]:
    """The numbers of a shard's members that hold tokens."""
    index = opened.index
    name = TOKEN_EXTENSIONS[index.header.token_bytes]
    return [n for n, kind in enumerate(index.extension_N.tolist()) if index.extensions[kind] == name]


def member_documents(opened: OpenShard, member: int) -> Documents:
    """The documents, or their pieces, in a tokens member."""
    index, item = opened.index, opened.tokens.itemsize
    begin = int(index.data_offset_N[member]) // item
    end = begin + int(index.size_N[member]) // item
    low, high = np.searchsorted(index.piece_start_P, np.asarray([begin, end], index.piece_start_P.dtype))
    first = int(np.searchsorted(index.first_piece_D1, low, side="right")) - 1
    start = index.piece_start_P[low:high].astype(np.int64) - begin
    tokens = opened.tokens[begin:end].astype(np.int64)
    return Documents(str(opened.path), first, tokens, start, index.piece_length_P[low:high].astype(np.int64))


def check_text(documents: Documents, vocabulary: int) -> None:
    """Raises DataError for an id that the text tokenizer does not have."""
    wrong = np.flatnonzero(documents.tokens_N >= vocabulary)
    if len(wrong):
        document = int(np.searchsorted(documents.begin_D, wrong[0], side="right")) - 1
        raise DataError(
            f"{documents.name(document)}: id {int(documents.tokens_N[wrong[0]])} is outside of the text vocabulary "
            f"of {vocabulary}. `data lint` of the dataset lists all damage."
        )


def check_pairs(documents: Documents, vocabulary: Vocabulary) -> None:
    """Check documents of a dataset that has a vocabulary of several modalities; text without a task token passes.

    Raises:
        DataError: a pair that is not `<task> <begin X> x <end X> <begin Y> y <end Y>` with the modalities of its
            task, ids of another modality in a side, a side that is empty or not a whole image or whole frames;
            naming shard and document.
    """
    tokens_N = documents.tokens_N
    outside = np.flatnonzero(tokens_N >= vocabulary.size)
    document_N = np.repeat(np.arange(len(documents.begin_D)), documents.length_D)
    if len(outside):
        raise DataError(
            f"{documents.name(int(document_N[outside[0]]))}: id {int(tokens_N[outside[0]])} is outside of the "
            f"vocabulary of {vocabulary.size}. {REPAIR}"
        )
    place_S = np.flatnonzero(tokens_N >= vocabulary.first_special)
    count_D = np.bincount(document_N[place_S], minlength=len(documents.begin_D))
    for document in np.flatnonzero((count_D != 0) & (count_D != PAIR_SPECIALS))[:1].tolist():
        kinds = tokens_N[place_S[document_N[place_S] == document]] - vocabulary.first_special
        raise DataError(f"{documents.name(document)} {_what_is_missing(kinds.tolist())}. {REPAIR}")
    is_pair_D = count_D == PAIR_SPECIALS
    text_N = ~is_pair_D[document_N]
    check_text(_only(documents, document_N, text_N), vocabulary.text.size)
    pairs = np.flatnonzero(is_pair_D)
    if len(pairs):
        place_D5 = place_S.reshape(-1, PAIR_SPECIALS)
        _check_order(documents, vocabulary, pairs, place_D5)
        _check_sides(documents, vocabulary, pairs, place_D5)


def _only(documents: Documents, document_N: np.ndarray, keep_N: np.ndarray) -> Documents:
    """The same documents with tokens that are not kept replaced by 0, which is text."""
    return Documents(
        documents.where,
        documents.first,
        np.where(keep_N, documents.tokens_N, 0),
        documents.begin_D,
        documents.length_D,
    )


def _what_is_missing(kinds: list[int]) -> str:
    """Say what is wrong with a document that has specials, but not those of a pair."""
    names = [SPECIALS[kind] for kind in kinds]
    task = names[0].strip("<>")
    if task in TASKS:
        for side, modality in zip(("condition", "target"), TASKS[task], strict=True):
            if f"<begin {modality}>" not in names:
                other = next(m for m in TASKS[task] if m != modality)
                what = "caption" if modality == "text" else modality
                article = "an" if other[0] in "aeiou" else "a"
                return f"is {article} {other} without its {what}: a {task} pair whose {side} is missing"
    return f"has {len(names)} specials ({' '.join(names[:8])}); a pair has {PAIR_SPECIALS} and text has none"


def _check_order(
    documents: Documents, vocabulary: Vocabulary, pairs: np.ndarray, place_D5: np.ndarray
) -> None:
    """The five specials are those of a task, at the places where they belong."""
    kinds_D5 = documents.tokens_N[place_D5] - vocabulary.first_special
    first_task = SPECIALS.index(f"<{next(iter(TASKS))}>")
    wanted = np.asarray([[SPECIALS.index(name) for name in _specials_of(task)] for task in TASKS])
    have = np.asarray([task in vocabulary.tasks() for task in TASKS])
    task_D = np.clip(kinds_D5[:, 0] - first_task, 0, len(TASKS) - 1)
    good_D = (kinds_D5 == wanted[task_D]).all(1) & have[task_D]
    begin_D, end_D = documents.begin_D[pairs], documents.begin_D[pairs] + documents.length_D[pairs]
    good_D &= (place_D5[:, 0] == begin_D) & (place_D5[:, 4] == end_D - 1)
    good_D &= (place_D5[:, 1] == begin_D + 1) & (place_D5[:, 3] == place_D5[:, 2] + 1)
    for wrong in np.flatnonzero(~good_D)[:1].tolist():
        names = " ".join(SPECIALS[kind] for kind in kinds_D5[wrong].tolist())
        raise DataError(
            f"{documents.name(int(pairs[wrong]))} is no pair: its specials are {names} at "
            f"{(place_D5[wrong] - begin_D[wrong]).tolist()}, not `<task> <begin X> x <end X> <begin Y> y <end Y>`. "
            f"{REPAIR}"
        )


def _specials_of(task: str) -> list[str]:
    given, made = TASKS[task]
    return [f"<{task}>", f"<begin {given}>", f"<end {given}>", f"<begin {made}>", f"<end {made}>"]


def _check_sides(
    documents: Documents, vocabulary: Vocabulary, pairs: np.ndarray, place_D5: np.ndarray
) -> None:
    """Each side holds ids of its modality: a whole image of the grid, whole frames of all codebooks."""
    kinds_D5 = documents.tokens_N[place_D5] - vocabulary.first_special
    for side in (1, 3):
        opened_D = kinds_D5[:, side]
        for kind in np.unique(opened_D).tolist():
            modality = vocabulary.modality(SPECIALS[kind].removeprefix("<begin ").rstrip(">"))
            chosen = np.flatnonzero(opened_D == kind)
            begin_D, end_D = place_D5[chosen, side] + 1, place_D5[chosen, side + 1]
            _check_lengths(documents, modality, pairs[chosen], end_D - begin_D)
            _check_ids(documents, modality, pairs[chosen], begin_D, end_D - begin_D)


def _check_lengths(
    documents: Documents, modality: Modality, number_D: np.ndarray, length_D: np.ndarray
) -> None:
    whole = "at least one token"
    good_D = length_D > 0
    if modality.grid is not None:
        tokens = modality.grid[0] * modality.grid[1]
        whole = f"{tokens} tokens ({modality.grid[0]} x {modality.grid[1]})"
        good_D &= length_D == tokens
    elif modality.codebooks > 1:
        whole = f"a multiple of {modality.codebooks} tokens (one per codebook)"
        good_D &= length_D % modality.codebooks == 0
    for wrong in np.flatnonzero(~good_D)[:1].tolist():
        raise DataError(
            f"{documents.name(int(number_D[wrong]))}: its {modality.name} has {int(length_D[wrong])} tokens, not "
            f"{whole}. {REPAIR}"
        )


def _check_ids(
    documents: Documents, modality: Modality, number_D: np.ndarray, begin_D: np.ndarray, length_D: np.ndarray
) -> None:
    """All ids of the sides lie in the modality's range, and in their codebook's share of it."""
    before_D = np.cumsum(length_D) - length_D
    offset_N = np.arange(int(length_D.sum())) - np.repeat(before_D, length_D)
    ids_N = documents.tokens_N[np.repeat(begin_D, length_D) + offset_N]
    size = modality.size // modality.codebooks
    low_N = modality.first + size * (offset_N % modality.codebooks)
    for wrong in np.flatnonzero((ids_N < low_N) | (ids_N >= low_N + size))[:1].tolist():
        document = int(number_D[np.searchsorted(before_D, wrong, side="right") - 1])
        low = int(low_N[wrong])
        raise DataError(
            f"{documents.name(document)}: id {int(ids_N[wrong])} in its {modality.name} part, at its token "
            f"{int(offset_N[wrong])}, is not one of {low} to {low + size - 1}. {REPAIR}"
        )
