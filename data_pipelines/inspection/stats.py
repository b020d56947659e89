"""Figures about a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.rows.cut_rows import OpenSource
from data_pipelines.rows.order import TokenStream
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_stream import WholeStream
from data_pipelines.storage.dataset import Dataset, Shard
from data_pipelines.tokens.document_form import member_documents, token_members
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.vocabulary import SPECIALS, TASKS, Vocabulary, load_vocabulary

PERCENTILES = (1, 10, 50, 90, 99, 100)
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class SplitFigures:
    """What `triptych data stats` shows of one split. Lengths are in tokens, end-of-text included."""

    name: str
    shards: int
    documents: int
    tokens: int
    text_bytes: int
    length_percentiles: dict[int, int]
    histogram: list[tuple[int, int, int]]  # (from, below, documents), in powers of two
    tasks: dict[str, int]  # documents by what they teach; empty for a dataset of text alone
    modality_tokens: dict[str, int]  # tokens of each modality, and "structure"; empty as before

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token."""
        return self.text_bytes / self.tokens


def describe_split(dataset: Dataset, name: str) -> SplitFigures:
    """Collect the figures of one split from its indices, a shard at a time."""
    split = dataset.split(name)
    lengths = np.concatenate([Shard(dataset, record).index().document_tokens() for record in split.shards])
    power = np.log2(lengths).astype(np.int64)
    counts = np.bincount(power)
    histogram = [(1 << p, 2 << p, int(counts[p])) for p in range(int(power.min()), len(counts))]
    tasks, modality_tokens = _kinds(dataset, name)
    chosen = np.percentile(lengths, PERCENTILES, method="nearest").astype(int).tolist()
    return SplitFigures(
        name,
        len(split.shards),
        split.documents,
        split.tokens,
        split.text_bytes,
        dict(zip(PERCENTILES, chosen, strict=True)),
        histogram,
        tasks,
        modality_tokens,
    )


def _kinds(dataset: Dataset, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Documents by task and tokens by modality of a dataset of pairs, from its tokens, a member at a time."""
    vocabulary = load_vocabulary(dataset.path)
    tasks: dict[str, int] = {}
    tokens: dict[str, int] = {}
    if vocabulary is None:
        return tasks, tokens
    borders = [modality.end for modality in vocabulary.modalities]
    names = [*(modality.name for modality in vocabulary.modalities), "structure"]
    for record in dataset.split(name).shards:
        opened = Shard(dataset, record).open()
        for member in token_members(opened):
            documents = member_documents(opened, member)
            first = documents.tokens_N[documents.begin_D]
            for task in TASKS:
                _add(tasks, task, int((first == vocabulary.task(task)).sum()))
            _add(tasks, "text", int((first < vocabulary.first_special).sum()))
            counts = np.bincount(
                np.searchsorted(borders, documents.tokens_N, side="right"), minlength=len(names)
            )
            for kind, count in zip(names, counts.tolist(), strict=True):
                _add(tokens, kind, count)
    return tasks, tokens


def _add(counts: dict[str, int], key: str, count: int) -> None:
    if count:
        counts[key] = counts.get(key, 0) + count


def padding_share(dataset: Dataset, name: str, sequence_length: int) -> float:
    """Which share of rows of whole documents is padding at a sequence length.

    Raises:
        DataError: a pair is longer.
    """
    source = OpenSource(dataset, name, 1.0)
    stream = WholeStream(source, vocabulary_of([source]), sequence_length, None, 1)
    return 1 - stream.tokens / (stream.rows * sequence_length)


def render(vocabulary: Vocabulary, tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """A document of pairs for people: text as text, specials by name, the rest as how many there are."""
    parts = []
    borders = [modality.end for modality in vocabulary.modalities]
    kinds = np.searchsorted(borders, ids, side="right")
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(kinds)) + 1):
        kind = int(kinds[run[0]])
        if kind == 0:
            parts.append(tokenizer.decode(ids[run]))
        elif kind == len(borders):
            parts += [SPECIALS[token - vocabulary.first_special] for token in ids[run].tolist()]
        else:
            parts.append(f"[{len(run)} {vocabulary.modalities[kind].name} tokens]")
    return " ".join(parts)


def first_words(text: str) -> str:
    """Up to three words that a text begins with, at most 32 characters of them: a prompt that is like the data."""
    return " ".join(text[:32].split()[:3])


def sample_texts(dataset: Dataset, tokenizer: Tokenizer, split: str, count: int) -> list[str]:
    """The beginnings of some documents of a split, spread over a shuffled order."""
    stream = TokenStream(dataset, split, ("sample",), 1)
    vocabulary = load_vocabulary(dataset.path)
    texts: list[str] = []
    begin = 0
    while len(texts) < count and begin < stream.tokens:
        runs = stream.runs(np.asarray([begin]), min(4096, stream.tokens - begin))
        for number in np.flatnonzero(runs.begins_R).tolist()[: count - len(texts)]:
            start, length = int(runs.start_R[number]), int(runs.length_R[number])
            tokens = runs.shards[int(runs.shard_R[number])].tokens[start : start + min(length, SAMPLE_TOKENS)]
            texts.append(
                tokenizer.decode(tokens) if vocabulary is None else render(vocabulary, tokenizer, tokens)
            )
        begin += 4096
    return texts
