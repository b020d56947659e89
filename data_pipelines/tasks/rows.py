"""Rows of a synthetic task by number: a pure function of (seed, purpose, task, length, row). B rows, T time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from data_pipelines.errors import DataError
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.tasks.base import Task


class TaskRows:
    """Fresh sequences, each one document. Training and evaluation rows of one seed are never the same draws.

    Args:
        task: what to draw.
        sequence_length: T.
        seed: of the draws.
        purpose: training and evaluation draw from streams of their own.

    Raises:
        DataError: an option does not fit the task or the length.
    """

    def __init__(
        self, task: Task, sequence_length: int, seed: int, purpose: Literal["train", "evaluate"]
    ) -> None:
        if problems := task.problems(sequence_length):
            raise DataError("; ".join(f"task {task.name}, {key}: {message}" for key, message in problems))
        self.task, self.sequence_length = task, sequence_length
        identity = {
            "draws": 1,  # raise it if the draws ever change
            "task": task.name,
            **dataclasses.asdict(task),
            "sequence_length": sequence_length,
            "seed": seed,
            "purpose": purpose,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()
        self.refused: dict[str, str] = {}
        self._key = int.from_bytes(digest.digest()[:8], "little")

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order.

        Args:
            cursor: what the batch carries; by default the state after the highest of these rows.
        """
        numbers = np.asarray(rows, np.int64)
        assert numbers.ndim == 1 and len(numbers) and numbers.min() >= 0, f"row numbers {rows}"
        symbols_BT = np.stack([self._symbols(int(row)) for row in numbers])
        answers = self.task.answers(symbols_BT)
        count, length = symbols_BT.shape
        sequences = np.zeros((count, length + 1), np.int64)
        sequences[:, :length] = symbols_BT
        return Batch(
            sequences=torch.from_numpy(sequences),
            weights=torch.from_numpy(answers.scored),
            segment_ids=torch.zeros(count, length, dtype=torch.int16),
            positions=torch.arange(length, dtype=torch.int32 if length > 2**15 else torch.int16).repeat(
                count, 1
            ),
            rows=torch.from_numpy(numbers),
            cursor=cursor or Cursor(int(numbers.max()) + 1, self.fingerprint),
            answers=torch.from_numpy(answers.targets),
        )

    def _symbols(self, row: int) -> np.ndarray:
        return self.task.symbols(np.random.default_rng((self._key, row)), self.sequence_length)
