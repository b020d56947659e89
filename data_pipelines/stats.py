"""Figures about a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.dataset import Dataset, Shard
from data_pipelines.order import TokenStream
from data_pipelines.tokenizers import Tokenizer

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
    chosen = np.percentile(lengths, PERCENTILES, method="nearest").astype(int).tolist()
    return SplitFigures(
        name,
        len(split.shards),
        split.documents,
        split.tokens,
        split.text_bytes,
        dict(zip(PERCENTILES, chosen, strict=True)),
        histogram,
    )


def sample_texts(dataset: Dataset, tokenizer: Tokenizer, split: str, count: int) -> list[str]:
    """The beginnings of some documents of a split, spread over a shuffled order."""
    stream = TokenStream(dataset, split, ("sample",), 1)
    texts: list[str] = []
    begin = 0
    while len(texts) < count and begin < stream.tokens:
        runs = stream.runs(np.asarray([begin]), min(4096, stream.tokens - begin))
        for number in np.flatnonzero(runs.begins_R).tolist()[: count - len(texts)]:
            start, length = int(runs.start_R[number]), int(runs.length_R[number])
            tokens = runs.shards[int(runs.shard_R[number])].tokens[start : start + min(length, SAMPLE_TOKENS)]
            texts.append(tokenizer.decode(tokens))
        begin += 4096
    return texts
