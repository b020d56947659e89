"""Rows of pairs and text in memory, as a reader of whole documents gives them. B rows, T time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipelines.rows.mixing import Mixture
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.tokens.vocabulary import Modality, Vocabulary
from models import families
from models.initialise import initialise
from models.trimodal.model import Trimodal
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.objectives.masked_diffusion import MaskedDiffusion

VOCABULARY = Vocabulary(
    text=Modality("text", 0, 8, "words"),
    eot=7,
    image=Modality("image", 8, 6, "patches", grid=(2, 2)),
    audio=Modality("audio", 14, 5, "frames"),
)


def pair(task: str, given: Sequence[int], made: Sequence[int]) -> list[int]:
    """A document of `task`; codes count from 0 in each modality."""
    v = VOCABULARY
    (x, y) = task.split("-to-")
    sides = [
        [v.begin(name), *(v.modality(name).first + code for code in codes), v.end(name)]
        for name, codes in ((x, given), (y, made))
    ]
    return [v.task(task), *sides[0], *sides[1]]


def batch_of(rows: Sequence[Sequence[Sequence[int]]], length: int, numbers: Sequence[int]) -> Batch:
    """A batch of rows of whole documents, padded."""
    tokens = np.full((len(rows), length + 1), VOCABULARY.pad, np.int64)
    segments, positions = (np.zeros((len(rows), length), np.int16) for _ in range(2))
    for row, documents in enumerate(rows):
        filled = 0
        for number, document in enumerate(documents):
            end = filled + len(document)
            tokens[row, filled:end] = document
            segments[row, filled:end], positions[row, filled:end] = number, np.arange(len(document))
            filled = end
        assert filled <= length
        segments[row, filled:], positions[row, filled:] = len(documents), np.arange(length - filled)
    sequences = torch.from_numpy(tokens)
    return Batch(
        sequences=sequences,
        weights=sequences[:, :-1] != VOCABULARY.pad,
        segment_ids=torch.from_numpy(segments),
        positions=torch.from_numpy(positions),
        rows=torch.tensor(numbers),
        cursor=Cursor(max(numbers) + 1, "rows"),
    )


ROW = [
    pair("text-to-image", [3], [1, 5, 2]),
    [4, 2, 7],
    pair("audio-to-text", [4, 0], [6, 1]),
]
"""28 tokens: 3 + 3 + 2 of them targets."""


@dataclass
class RepeatedRow:
    """The same row again and again."""

    row: list[list[int]] = field(default_factory=lambda: ROW)
    length: int = 32
    fingerprint: str = "repeated"
    mixture: Mixture = field(default_factory=lambda: Mixture([1.0]))

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The row, under these numbers."""
        one = batch_of([self.row], self.length, [0])
        many = one.take(torch.zeros(len(rows), dtype=torch.long))
        return replace(many, rows=torch.tensor(list(rows)), cursor=cursor or many.cursor)


@dataclass
class DrawnRows:
    """Two sources of random documents: rows of two image pairs, and rows of texts and sounds."""

    seed: int = 5
    length: int = 40
    mixture: Mixture = field(default_factory=lambda: Mixture([0.75, 0.25]))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"drawn {self.seed} {self.length}".encode()).hexdigest()

    def documents(self, row: int) -> list[list[int]]:
        """A row's documents, a pure function of its number."""
        random = np.random.default_rng([self.seed, row])
        source = self.mixture.draws(np.array([row]))[0][0]
        if source == 0:
            digits = random.integers(0, 6, 2)
            return [
                pair("text-to-image", [int(d)], [int(d), *random.integers(0, 6, 3).tolist()]) for d in digits
            ]
        words = random.integers(0, 7, int(random.integers(2, 7))).tolist()
        frames = random.integers(0, 5, int(random.integers(1, 4))).tolist()
        return [[*words, VOCABULARY.eot], pair("audio-to-text", frames, words[:2])]

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers."""
        batch = batch_of([self.documents(row) for row in rows], self.length, list(rows))
        return batch if cursor is None else replace(batch, cursor=cursor)


def objective_of(seed: int = 0, axes: int = 1, **settings: Any) -> MaskedDiffusion:
    section = MaskedDiffusionSection.model_validate({"kind": "masked_diffusion", **settings})
    return MaskedDiffusion(section, VOCABULARY, seed, axes)


def every_modality(**settings: Any) -> dict[str, Any]:
    return dict.fromkeys(("text", "image", "audio"), settings)


def small_model(**settings: Any) -> Trimodal:
    """One layer, with weights so large that what is shown matters."""
    config = families["trimodal"].config(**{"layers": 1, "width": 16, "heads": 2, "norm": "pre", **settings})
    model = families["trimodal"].build(config.resolved(vocabulary=64, sequence_length=32))
    initialise(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.5 if name == "head.weight" else 2)
    assert isinstance(model, Trimodal)
    return model
