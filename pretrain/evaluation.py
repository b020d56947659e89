"""The loss of a trained model on any dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data_pipelines.stream import RowReader, Source, evaluation_batches, open_sources
from pretrain.checkpoint_reader import TrainedModel
from pretrain.errors import UserError
from pretrain.objectives import build_objective


@dataclass(frozen=True)
class Result:
    tokens: int
    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@torch.no_grad()
def evaluate(
    trained: TrainedModel,
    paths: list[str],
    split: str,
    *,
    limit_rows: int | None = None,
    rows_per_batch: int = 8,
    watch: Callable[[Iterator], Iterator] = lambda batches: batches,
) -> Result:
    """Loss over the split in stored order, each token once. `watch` wraps the batches, for a progress bar.

    Raises UserError if the dataset was built with another tokenizer than the model's.
    """
    sources = open_sources([Source(path=path) for path in paths], split=split)
    if sources.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"{paths[0]}: built with tokenizer {sources.tokenizer.fingerprint[:12]} ({sources.tokenizer.description}), "
            f"the run has {trained.tokenizer.fingerprint[:12]} ({trained.tokenizer.description}); rebuild the dataset "
            f"with `triptych data build ... --tokenizer {trained.path.parent.parent / 'tokenizer'}/tokenizer.json`"
        )
    length = trained.config.data.sequence_length
    reader = RowReader(sources, sequence_length=length, seed=0, shuffle=False)
    objective = build_objective(trained.config.objective)
    loss_sum = weight = 0.0
    batches = evaluation_batches(reader, rows_per_batch=rows_per_batch, rank=0, world=1, limit_rows=limit_rows)
    for batch in watch(batches):
        on_device = batch.to(trained.device)
        loss_sum += float(objective(trained.model, on_device).loss)
        weight += float(objective.weight(on_device))
    nats = loss_sum / weight
    return Result(int(weight), nats, nats / math.log(2) / (sources.text_bytes / sources.tokens))
