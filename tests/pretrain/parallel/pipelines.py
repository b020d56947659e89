"""What a test does with an open run of four blocks, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.stream.batch import Batch
from pretrain.assembly import open_run
from pretrain.config import Config, load_config
from pretrain.engine.base import Evaluation
from pretrain.loop import train
from pretrain.run import Run
from tests.e2e.training import StopAt
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import Datasets, write_run
from tests.pretrain.parallel.table import LAYERS


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    losses: list[float]
    gradient_norms: list[float]
    evaluation: Evaluation
    logits: np.ndarray


def watch(run: Run) -> Seen:
    """Train to the end, evaluate, and let the model say what it thinks of a few tokens, at once and one by one."""
    losses, norms = [], []
    train_step = run.engine.train_step

    def noted(batch: Batch, objective: Any, lr_factor: float) -> Any:
        report = train_step(batch, objective, lr_factor)
        losses.append(float(report.loss_sum / report.weight))
        norms.append(float(report.gradient_norm))
        return report

    run.engine.train_step = noted  # type: ignore[method-assign]
    train(run)
    evaluation = run.engine.evaluate(run.validation_batches(), run.objective)
    with run.engine.inference() as model:
        logits = logits_of(model, run.objective).numpy()
    return Seen(losses, norms, evaluation, logits)


def logits_of(model: Any, objective: Any) -> torch.Tensor:
    tokens_BT = torch.arange(24).view(2, 12) % 20
    whole: torch.Tensor = model.head(model(tokens_BT))
    if objective.parts:  # a bidirectional model keeps no state
        return whole
    state = model.new_state(2, 12, torch.device("cpu"), whole.dtype)
    steps = [model.head(model(tokens_BT[:, at : at + 1], state=state)) for at in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    return whole


def in_run(config: Config, function: Callable[[Run], Any], stop_at: int | None) -> Any:
    with open_run(config, quiet=True) as run:
        if stop_at is not None:
            run.hooks.add(StopAt(stop_at))
        return function(run)


def run_in(
    folder: Path,
    data: Datasets,
    model: str,
    world: int,
    settings: Sequence[str],
    function: Callable[[Run], Any],
    *,
    steps: int = 6,
    stop_at: int | None = None,
) -> list[Any]:
    """What `function` of the open run returns on each rank. Called again it goes on from the last checkpoint."""
    config = load_config(write_run(folder, data, model, steps), [LAYERS, *settings])
    return run_ranks(world, in_run, config, function, stop_at, timeout_s=150)
