"""Tiny runs on the Megatron engine, for comparing them with one process of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.batch import Batch
from pretrain.config import Config, load_config
from pretrain.engine.base import Evaluation
from pretrain.imports import quick_and_quiet
from pretrain.loop import train
from pretrain.run import Run, open_run
from tests.e2e.pairs import TASKS, build_pairs
from tests.e2e.training import StopAt
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import Curve, Datasets, train_in, write_run

LAYERS = "model.layers=4"


def import_megatron() -> None:
    """In the process that forks the ranks: what would cost each of them seconds."""
    with quick_and_quiet():
        import megatron.core.distributed
        import megatron.core.optimizer.distrib_optimizer
        import megatron.core.pipeline_parallel.schedules
        import megatron.core.transformer.multi_token_prediction  # noqa: F401


def build_datasets(folder: Path, corpus: Path) -> Datasets:
    build_pairs(folder)
    return Datasets(corpus, (folder / "text", *(folder / task for task in TASKS)))


class References:
    """Curves of one process without ZeRO, the whole batch at once; each is trained once."""

    def __init__(self, folder: Path, data: Datasets) -> None:
        self._folder, self._data = folder, data
        self._known: dict[tuple[str, ...], Curve] = {}

    def __call__(self, model: str, settings: Sequence[str] = (), steps: int = 6) -> Curve:
        key = (model, str(steps), *settings)
        if key not in self._known:
            folder = self._folder / str(len(self._known))
            self._known[key] = train_in(folder, self._data, model, 1, [LAYERS, *settings], steps)
        return self._known[key]


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
