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

from data_pipelines.errors import DataError
from data_pipelines.rows.mixing import Mixture
from data_pipelines.rows.order import Runs, TokenStream, join_runs
from data_pipelines.rows.packing import pack
from data_pipelines.storage.dataset import Dataset, open_dataset
from data_pipelines.stream.batch import Batch, Cursor

ORDER = 2
"""Raise it if what a row holds ever changes."""
FIRST_TOKENS_UNTRAINED = (
    "was trained by an earlier version, in whose rows the first token of a document was never predicted and the rows "
    "of a long document followed each other. This version cannot go on with that order: finish the run with the "
    "version that began it, or begin a new one under another run.name"
)


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
class RowSpan:
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
        shuffle_rows: whether the rows of a window of shards are permuted, so that those of a long document do not
            follow each other.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        sequence_length: int,
        seed: int,
        window_shards: int = 16,
        shuffle: bool = True,
        shuffle_rows: bool = True,
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
        self._shuffle_rows = shuffle and shuffle_rows
        settings: dict[str, Any] = {
            "weights": self.mixture.weights,
            "sequence_length": sequence_length,
            "seed": seed,
            "window_shards": window_shards,
            "shuffle": shuffle,
        }
        self.refused: dict[str, str] = {
            order_fingerprint({"order": 1}, self.sources, settings): FIRST_TOKENS_UNTRAINED
        }
        self.fingerprint = order_fingerprint(
            {"order": ORDER}, self.sources, settings | {"shuffle_rows": shuffle_rows}
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

    def documents(self, row: int) -> list[RowSpan]:
        """Which documents' tokens are the T targets of a row, for tests and people."""
        sources, draws = self.mixture.draws(np.asarray([row], np.int64))
        source = int(sources[0])
        begin = int(self._intervals(source, draws)[0]) * self.sequence_length
        spans = self._streams[source].documents(begin, self.sequence_length)
        return [RowSpan(source, span.epoch, span.document, span.first, span.count) for span in spans]

    def _intervals(self, source: int, draw_B: np.ndarray) -> np.ndarray:
        """Which interval of T tokens of a source's stream each of its rows takes."""
        stream = self._streams[source]
        return stream.shuffle_rows(draw_B, self.sequence_length) if self._shuffle_rows else draw_B

    def _runs(self, rows: np.ndarray) -> Runs:
        """The runs of the rows' T tokens and of the one before them; interval = place in `rows`."""
        source, draw = self.mixture.draws(rows)
        runs: list[Runs] = []
        places: list[np.ndarray] = []
        for number, stream in enumerate(self._streams):
            place = np.flatnonzero(source == number)
            if len(place):
                begin = self._intervals(number, draw[place]) * self.sequence_length - 1
                order = np.argsort(begin, kind="stable")
                runs.append(stream.runs(begin[order], self.sequence_length + 1))
                places.append(place[order])
        return join_runs(runs, places)
