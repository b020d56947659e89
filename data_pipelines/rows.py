"""Row g of a run: its tokens, as a pure function of (seed, datasets, mixture, g)."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import Batch, Cursor
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.errors import DataError
from data_pipelines.mixing import Mixture
from data_pipelines.order import Runs, TokenStream, join_runs
from data_pipelines.packing import pack


@dataclass(frozen=True)
class Source:
    """A dataset folder and its share of the rows."""

    path: Path | str
    weight: float = 1.0


@dataclass(frozen=True)
class OpenSource:
    """An opened dataset, the split to read, and its share of the rows."""

    dataset: Dataset
    split: str
    weight: float

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return self.dataset.split(self.split).tokens

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return self.dataset.split(self.split).documents

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return self.dataset.split(self.split).text_bytes


@dataclass(frozen=True)
class RowPart:
    """A run of one document's tokens in a row."""

    source: int
    epoch: int
    document: int  # number in the split, in stored order
    first: int  # token of the document
    count: int


def open_sources(sources: Sequence[Source], split: str = "train") -> list[OpenSource]:
    """Open datasets and check that they have the split, data in it, and one tokenizer.

    Raises:
        DataError: naming the folder and what to do.
    """
    if not sources:
        raise DataError("no dataset given: name at least one folder in data.path.")
    opened = [OpenSource(open_dataset(source.path), split, float(source.weight)) for source in sources]
    for source in opened:
        source.dataset.split(split)
        first, here = opened[0].dataset, source.dataset
        if here.tokenizer["fingerprint"] != first.tokenizer["fingerprint"]:
            raise DataError(
                f"{here.path} was built with tokenizer {here.tokenizer['fingerprint'][:12]} "
                f"({here.vocabulary:,} ids), {first.path} with {first.tokenizer['fingerprint'][:12]} "
                f"({first.vocabulary:,} ids). Build one of them again, with "
                f"`--tokenizer {shlex.quote(str(first.path))}`."
            )
    return opened


def order_fingerprint(
    rule: Mapping[str, Any], sources: Sequence[OpenSource], settings: Mapping[str, Any]
) -> str:
    """Equal for readers that give equal rows.

    rule: the version of the order, and what else decides what a row's ids mean. settings: mixture, length, seed ...
    """
    data = {
        "datasets": [source.dataset.fingerprint for source in sources],
        "splits": [source.split for source in sources],
    }
    return hashlib.sha256(json.dumps({**rule, **data, **settings}).encode()).hexdigest()


class RowReader:
    """Reads rows by number. Can be pickled; caches stay behind.

    Args:
        sources: from `open_sources`.
        sequence_length: T.
        seed: of the order.
        window_shards: how many shards are shuffled together.
        shuffle: False reads the documents in stored order.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        sequence_length: int,
        seed: int,
        window_shards: int = 16,
        shuffle: bool = True,
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}; it must be at least 1.")
        for source in sources:
            if source.dataset.ranges is not None:
                raise DataError(
                    f"{source.dataset.path}: a dataset of pairs, which only masked diffusion trains on "
                    "(model.family trimodal); name a dataset of text in data.path."
                )
        self.sources = list(sources)
        self.sequence_length, self.seed = sequence_length, seed
        self.mixture = Mixture([source.weight for source in self.sources])
        self.eot = self.sources[0].dataset.eot
        self._streams = [
            TokenStream(s.dataset, s.split, (seed, number) if shuffle else None, window_shards)
            for number, s in enumerate(self.sources)
        ]
        self.fingerprint = order_fingerprint(
            {"order": 1},  # raise it if the order of rows ever changes
            self.sources,
            {
                "weights": self.mixture.weights,
                "sequence_length": sequence_length,
                "seed": seed,
                "window_shards": window_shards,
                "shuffle": shuffle,
            },
        )

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order.

        Args:
            cursor: what the batch carries; by default the state after the highest of these rows.

        Raises:
            DataError: a member is damaged, with shard, member and offset.
        """
        numbers = np.asarray(rows, np.int64)
        assert numbers.ndim == 1 and len(numbers) and numbers.min() >= 0, f"row numbers {rows}"
        cursor = cursor or Cursor(int(numbers.max()) + 1, self.fingerprint)
        runs = self._runs(numbers)
        return pack(runs, numbers, self.sequence_length, self.eot, cursor)

    def documents(self, row: int) -> list[RowPart]:
        """Which documents fill the T inputs of a row, for tests and people."""
        sources, draws = self.mixture.draws(np.asarray([row], np.int64))
        source, begin = int(sources[0]), int(draws[0]) * self.sequence_length
        parts = self._streams[source].documents(begin, self.sequence_length)
        return [RowPart(source, part.epoch, part.document, part.first, part.count) for part in parts]

    def _runs(self, rows: np.ndarray) -> Runs:
        """The runs of the rows' T + 1 tokens; interval = place in `rows`."""
        source, draw = self.mixture.draws(rows)
        if len(self._streams) == 1 and bool((rows[:-1] <= rows[1:]).all()):  # nothing to sort or to join
            return self._streams[0].runs(draw * self.sequence_length, self.sequence_length + 1)
        parts: list[Runs] = []
        places: list[np.ndarray] = []
        for number, stream in enumerate(self._streams):
            place = np.flatnonzero(source == number)
            if len(place):
                place = place[np.argsort(draw[place], kind="stable")]
                begin = draw[place] * self.sequence_length
                parts.append(stream.runs(begin, self.sequence_length + 1))
                places.append(place)
        return join_runs(parts, places)
