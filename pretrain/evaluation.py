"""The loss of a trained model on any dataset."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.evaluation import bytes_per_token, evaluation_batches, evaluation_rows
from data_pipelines.stream.batch import Batch
from data_pipelines.stream.stream import dealt_batches
from data_pipelines.tasks import TaskRows, build_task
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from pretrain.accuracy import Accuracy, accuracy_of, count_right
from pretrain.checkpoint_reader import TrainedModel
from pretrain.engine.base import Evaluation
from pretrain.errors import UserError
from pretrain.objectives import build_objective
from pretrain.run_data import open_run_data

Watch = Callable[[Iterator[Batch], int], Iterable[Batch]]
"""Wraps the batches, of which there are so many, for a progress bar."""


def just_batches(batches: Iterator[Batch], count: int) -> Iterable[Batch]:
    """No progress bar."""
    return batches


@dataclass(frozen=True)
class Result:
    tokens: int
    nats_per_token: float
    bits_per_byte: float | None
    """None where the rows hold no text that their tokens stand for."""

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def evaluate_task(
    trained: TrainedModel,
    length: int | None,
    *,
    rows: int,
    rows_per_batch: int = 64,
    watch: Watch = just_batches,
) -> Accuracy:
    """Accuracy on the first `rows` evaluation sequences of the model's task, of another `length` if wanted."""
    config = trained.config
    assert config.data.task is not None
    task_rows = TaskRows(
        build_task(config.data.task), length or config.data.sequence_length, config.run.seed, "evaluate"
    )
    batches = dealt_batches(task_rows, rows, min(rows, rows_per_batch))
    return accuracy_of(count_right(trained.model, watch(batches, -(-rows // rows_per_batch)), trained.device))


def _spec_of(trained: TrainedModel) -> str:
    """What names the run's tokenizer to `triptych data build`."""
    file = trained.path.parent.parent / "tokenizer" / "tokenizer.json"
    return shlex.quote(str(file)) if file.is_file() else "bytes"


@torch.no_grad()
def evaluate(
    trained: TrainedModel,
    paths: list[str],
    split: str,
    *,
    limit_rows: int | None = None,
    rows_per_batch: int = 8,
    watch: Watch = just_batches,
) -> Result:
    """Loss over the split in stored order, each token once. `watch` wraps the batches, for a progress bar.

    Raises UserError if the dataset was built with another tokenizer than the model's.
    """
    sources = open_sources([Source(path=path) for path in paths], split=split)
    theirs = load_tokenizer(paths[0])
    if theirs.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"{paths[0]}: built with tokenizer {theirs.fingerprint[:12]} ({theirs.describe()}), "
            f"the run has {trained.tokenizer.fingerprint[:12]} ({trained.tokenizer.describe()}); rebuild the dataset "
            f"with `--tokenizer {_spec_of(trained)}`"
        )
    length = trained.config.data.sequence_length
    rows = min(evaluation_rows(sources, length), limit_rows or sys.maxsize)
    batches = evaluation_batches(sources, length, rows_per_batch, limit_rows=limit_rows)
    nats, weight = _loss(trained, watch(batches, -(-rows // rows_per_batch)))
    if not trained.config.objective.scores_text:
        return Result(int(weight), nats, None)
    per_token = bytes_per_token(sources, trained.tokenizer, length, limit_rows)
    return Result(int(weight), nats, None if per_token is None else nats / math.log(2) / per_token)


@torch.no_grad()
def evaluate_own(trained: TrainedModel, *, rows_per_batch: int = 8, watch: Watch = just_batches) -> Result:
    """Loss over what the run's data, of one's own, validate with."""
    data = open_run_data(trained.config)
    rows, _ = data.validation_rows
    nats, weight = _loss(
        trained, watch(data.validation_batches(rows_per_batch, 0, 1), -(-rows // rows_per_batch))
    )
    per_token = data.bytes_per_token if trained.config.objective.scores_text else None
    return Result(int(weight), nats, None if per_token is None else nats / math.log(2) / per_token)


def _loss(trained: TrainedModel, batches: Iterable[Batch]) -> tuple[float, float]:
    """The mean over all of them, and its weight."""
    objective = build_objective(trained.config)
    loss_sum = weight = 0.0
    for batch in objective.evaluation_batches(batches):
        on_device = batch.to(trained.device)
        loss_sum += float(objective(trained.model, on_device).loss)
        weight += float(objective.weight(on_device))
    return Evaluation(loss_sum, weight).loss, weight
