"""One run: what it is made of, and how far it is. `pretrain.assembly` puts one together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data_pipelines.rows.cut_rows import ORDER
from data_pipelines.stream.batch import Batch, Cursor
from pretrain.checkpoint import CheckpointStore, TrainingState
from pretrain.config.world import micro_batch_rows
from pretrain.engine.base import Engine
from pretrain.hooks.base import Hooks
from pretrain.hooks.evaluation import EvaluationHook
from pretrain.hooks.finite import FiniteHook
from pretrain.monitoring import Reporter
from pretrain.objectives import Objective
from pretrain.optim import schedule_factor
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.ranks import Ranks
from pretrain.random_state import random_state
from pretrain.run_data import RunData
from pretrain.run_folder import RunFolder
from pretrain.signals import StopRequest
from pretrain.versions import library_versions

if TYPE_CHECKING:
    from data_pipelines.stream.stream import Stream
    from pretrain.config import Config


@dataclass
class Clock:
    """How far the run is. Only the loop advances it."""

    steps: int
    step: int = 0
    tokens: int = 0
    cursor: Cursor | None = None

    def advance(self, cursor: Cursor, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens
        self.cursor = cursor

    @property
    def done(self) -> bool:
        return self.step >= self.steps


@dataclass
class Run:
    config: Config
    folder: RunFolder
    ranks: Ranks
    mesh: Mesh
    device: torch.device
    engine: Engine
    objective: Objective
    data: RunData
    stream: Stream
    store: CheckpointStore
    reporter: Reporter
    hooks: Hooks
    clock: Clock
    stop: StopRequest
    evaluation: EvaluationHook
    finite: FiniteHook

    def lr_factor(self, step: int) -> float:
        return schedule_factor(self.config.optim, step, self.config.run.steps)

    def validation_batches(self) -> Iterator[Batch]:
        rows = micro_batch_rows(self.config.data, self.mesh.data.size, self.config.parallel)
        batches = self.data.validation_batches(rows, self.mesh.data.rank, self.mesh.data.size)
        return self.objective.evaluation_batches(batches)

    def record(self, event: str, **facts: Any) -> None:
        if self.ranks.is_main:
            self.folder.record(event, **facts)

    def state(self) -> TrainingState:
        """All that a resume needs, as it is after the clock's last step."""
        assert self.clock.cursor is not None
        return TrainingState(
            fragments=self.engine.fragments(),
            meta={
                "step": self.clock.step,
                "tokens": self.clock.tokens,
                "cursor": self.clock.cursor.to_dict(),
                "hooks": self.hooks.state(),
                "config": self.config.to_dict(),
                "tokenizer": self.data.fingerprint,
                "row_order": ORDER,
                "vocabulary": None if self.data.vocabulary is None else self.data.vocabulary.to_dict(),
                "versions": library_versions(),
            },
            rank_bytes=random_state(),
        )
