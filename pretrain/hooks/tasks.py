"""Accuracy on a synthetic task, at the training length and at a longer one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist

from pretrain.accuracy import Accuracy, accuracy_of, count_right
from pretrain.config.world import micro_batch_rows
from pretrain.hooks.base import Setup
from pretrain.hooks.evaluation import PeriodicEvaluation
from pretrain.run_data import TaskData

if TYPE_CHECKING:
    from data_pipelines.tasks import TaskRows
    from pretrain.run import Run


class TaskHook(PeriodicEvaluation):
    """Its state remembers the last result, so that a resumed run does not evaluate its last step again."""

    name = "tasks"

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        data = setup.data
        return cls(setup.config.monitor.evaluate_every_steps, data) if isinstance(data, TaskData) else None

    def __init__(self, every: int | None, data: TaskData) -> None:
        super().__init__(every)
        self._data = data

    def _evaluate(self, run: Run) -> None:
        here = self._accuracy(run, self._data.evaluation)
        record = {
            "task/token_accuracy": here.token,
            "task/last_accuracy": here.last,
            "task/sequence_accuracy": here.sequence,
        }
        if self._data.longer is not None:
            longer = self._accuracy(run, self._data.longer)
            record |= {
                "task/longer_token_accuracy": longer.token,
                "task/longer_last_accuracy": longer.last,
                "task/longer_sequence_accuracy": longer.sequence,
            }
        self.last = {"step": run.clock.step, **record}
        run.reporter.write(run.clock.step, record)

    def _accuracy(self, run: Run, rows: TaskRows) -> Accuracy:
        data = run.mesh.data
        micro = micro_batch_rows(run.config.data, data.size, run.config.parallel)
        batches = self._data.batches(rows, micro, data.rank, data.size)
        with run.engine.inference() as model:
            counts = count_right(model, batches, run.device)
        if data.size > 1:
            dist.all_reduce(counts, group=data.group)
        return accuracy_of(counts)

    def state(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        self.last = state["last"]
