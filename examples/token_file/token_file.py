"""A file of token ids, data of one's own: what a tokenizer elsewhere wrote as 16-bit numbers, one document after the
other with nothing between (nanoGPT's train.bin, for instance).

Row g of a run is a pure function of (seed, file, row): the stretches of T + 1 tokens, in another order in each epoch.
Shape suffixes: B rows, T time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.stream.stream import dealt_batches
from pretrain.config.own import OwnDataSection
from pretrain.run_data import OwnData, with_vocabulary

if TYPE_CHECKING:
    from pretrain.config import Config


class Tokens(OwnDataSection):
    """What `data.own` may say in a config, beside its name."""

    opens: ClassVar[str] = "token_file:TokenFile"
    paths: ClassVar[tuple[str, ...]] = ("train", "validation")

    train: str
    validation: str
    vocabulary: int = Field(ge=2, le=2**16)
    """The tokenizer's: ids are below it."""

    def planned_vocabulary(self) -> int:
        return self.vocabulary


@dataclass(frozen=True, kw_only=True)
class TokenFile(OwnData):
    validation: TokenRows

    @classmethod
    def open(cls, config: Config, settings: Any) -> Self:
        size, length, seed = settings.vocabulary, config.data.sequence_length, config.run.seed
        return cls(
            config=with_vocabulary(config, size, f"{settings.train} has {size} ids", "the file's"),
            train=TokenRows(settings.train, length, size, seed),
            validation=TokenRows(settings.validation, length, size, seed=None),
        )

    @property
    def fingerprint(self) -> str:
        return f"{self.validation.vocabulary} ids of a token file"

    def describe(self) -> str:
        return self.fingerprint

    @property
    def validation_rows(self) -> tuple[int, int]:
        there = self.validation.count
        return min(there, self.config.monitor.evaluate_rows or there), there

    def validation_batches(self, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        return dealt_batches(self.validation, self.validation_rows[0], rows_per_batch, rank, world)


class TokenRows:
    """Rows by number. Can be pickled: the file is opened where it is read.

    Args:
        seed: of the order; None leaves the rows in that of the file.

    Raises:
        DataError: the file is not there, or too short for one row.
    """

    def __init__(self, path: str, length: int, vocabulary: int, seed: int | None) -> None:
        self.path, self.length, self.vocabulary, self._seed = path, length, vocabulary, seed
        tokens = self._open()
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise DataError(f"{path}: {len(tokens)} tokens make no row of {length} and the one after it.")
        ends = tokens[:4096].tobytes() + tokens[-4096:].tobytes()
        identity = f"{len(tokens)} {length} {seed} {hashlib.sha256(ends).hexdigest()}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.refused: dict[str, str] = {}
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order."""
        tokens, count, T = self._open(), len(rows), self.length
        starts = [self._place(row) * T for row in rows]
        sequences = np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64)
        if sequences.max() >= self.vocabulary:
            raise DataError(
                f"{self.path}: it has the id {sequences.max()}; name more than {self.vocabulary} ids."
            )
        kind = torch.int32 if T > 2**15 else torch.int16
        return Batch(
            sequences=torch.from_numpy(sequences),
            weights=torch.ones(count, T, dtype=torch.bool),
            segment_ids=torch.zeros(count, T, dtype=torch.int16),
            positions=torch.arange(T, dtype=kind).repeat(count, 1),
            rows=torch.tensor(rows),
            cursor=cursor or Cursor(max(rows) + 1, self.fingerprint),
        )

    def _place(self, row: int) -> int:
        epoch, number = divmod(row, self.count)
        if self._seed is None:
            return number
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.count, "token_file", self._seed, epoch)
        return int(self._order[1][number])

    def _open(self) -> np.ndarray:
        try:
            return np.memmap(Path(self.path), dtype="<u2", mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read as 16-bit tokens ({error}).") from None
