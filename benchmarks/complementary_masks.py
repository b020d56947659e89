"""Gradient variance of complementary mask pairs over independent masks, at equal cost, on a trained model.

A step has `--rows` rows either way. Two comparisons, both as the sum over all parameters of the gradient's variance:

- masks: every step sees the same documents, each in two rows, with two independent masks or a complementary pair;
- steps: as in training, steps of new documents: each once with a mask of its own, or half as many with a pair. This
  variance has that of the documents in it, of which pairs see half as many.

    triptych train configs/trimodal/demo.yaml
    python -m benchmarks.complementary_masks runs/digits --out benchmarks/results/complementary-masks.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import save
from data_pipelines.rows.mixing import Mixture
from data_pipelines.stream.batch import Batch, Cursor
from pretrain.checkpoint_reader import TrainedModel, load_trained_model
from pretrain.config.objective import MaskedDiffusionSection, ModalitySection
from pretrain.objectives.masked_diffusion import CorruptedRows, MaskedDiffusion, MixedRows
from pretrain.run_data import open_diffusion
from pretrain.run_folder import find_run

WEIGHTS = {
    "elbo, linear": ModalitySection(),
    "none, cosine": ModalitySection(schedule="cosine", weight="none"),
}


class TwiceMixed(Mixture):
    """Rows 2j and 2j + 1 are of row j's source, and two draws of it: mask ratios stay stratified."""

    def draws(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, draw) of each row."""
        source, draw = super().draws(rows // 2)
        return source, 2 * draw + rows % 2


@dataclass
class Twice:
    """Rows 2j and 2j + 1 hold the documents of row j, and each row is a draw of its own."""

    rows: MixedRows

    @property
    def fingerprint(self) -> str:
        return self.rows.fingerprint

    @property
    def mixture(self) -> Mixture:
        return TwiceMixed(self.rows.mixture.weights)

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers."""
        numbers = np.asarray(rows) // 2
        unique, places = np.unique(numbers, return_inverse=True)
        batch = self.rows.batch(unique.tolist(), cursor).take(torch.from_numpy(places))
        return replace(batch, rows=torch.as_tensor(list(rows)))


def gradient(model: nn.Module, objective: MaskedDiffusion, batch: Batch) -> Tensor:
    """The step's gradient, one flat vector."""
    model.zero_grad(set_to_none=True)
    (objective(model, batch).total / objective.weight(batch)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def variance(gradients: Iterator[Tensor]) -> tuple[float, float]:
    """Total variance over the steps, and the square of the mean gradient's norm, corrected for its own variance."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for count, found in enumerate(gradients, start=1):
        wide = found.double()
        change = wide - mean
        mean = mean + change / count
        square = square + change * (wide - mean)
    total = float(square.sum()) / (count - 1)
    return total, float(mean.square().sum()) - total / count


def objectives(
    trained: TrainedModel, modality: ModalitySection, complementary: bool
) -> Callable[[int], MaskedDiffusion]:
    """The run's objective with other weights, by seed, without dropped conditions."""
    section = trained.config.objective
    assert isinstance(section, MaskedDiffusionSection) and trained.modalities is not None
    changes: dict[str, Any] = {"complementary": complementary, "condition_dropout": 0.0}
    changed = section.model_copy(update={**changes, **dict.fromkeys(("text", "image", "audio"), modality)})
    vocabulary, axes = trained.modalities.vocabulary, trained.config.model.position_axes
    return lambda seed: MaskedDiffusion(changed, vocabulary, seed, axes)


def compare(
    trained: TrainedModel, rows: MixedRows, modality: ModalitySection, size: int, steps: int
) -> dict[str, Any]:
    """Both comparisons under one training weight."""
    independent = objectives(trained, modality, complementary=False)
    paired = objectives(trained, modality, complementary=True)

    def masks(make: Callable[[int], MaskedDiffusion], source: MixedRows) -> Iterator[Tensor]:
        for seed in range(steps):
            objective = make(seed)
            yield gradient(trained.model, objective, CorruptedRows(source, objective).batch(range(size)))

    def training(make: Callable[[int], MaskedDiffusion]) -> Iterator[Tensor]:
        objective = make(0)
        for step in range(steps):
            batch = CorruptedRows(rows, objective).batch(range(step * size, (step + 1) * size))
            yield gradient(trained.model, objective, batch)

    measured = {
        "masks": (variance(masks(independent, Twice(rows))), variance(masks(paired, rows))),
        "steps": (variance(training(independent)), variance(training(paired))),
    }
    return {
        name: {
            "independent": alone[0],
            "complementary": pair[0],
            "ratio": pair[0] / alone[0],
            "mean_gradient_squared": {"independent": alone[1], "complementary": pair[1]},
        }
        for name, (alone, pair) in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run of masked diffusion")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, even")
    parser.add_argument("--steps", type=int, default=128, help="steps to take the variance of")
    parser.add_argument("--step", type=int, default=None, help="a saved step; default: the newest")
    parser.add_argument("--out", type=Path, default=None, help="write JSON here")
    arguments = parser.parse_args()
    trained = load_trained_model(find_run(arguments.run), arguments.step)
    rows = open_diffusion(trained.config).train
    results: dict[str, Any] = {}
    for name, modality in WEIGHTS.items():
        results[name] = compare(trained, rows, modality, arguments.rows, arguments.steps)
        for kind, found in results[name].items():
            print(f"{name:14s} {kind:6s} complementary over independent: {found['ratio']:.3f}", flush=True)
    facts = {"trained_steps": trained.step, "rows": arguments.rows, "steps": arguments.steps}
    save({**facts, "weights": results}, arguments.out)


if __name__ == "__main__":
    main()
