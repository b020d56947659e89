"""Tiny runs of every family, for comparing layouts with one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.training import losses, train_rank
from tests.harness import run_ranks

RUN = """
run: {{name: tiny, folder: {folder}, steps: {steps}, device: cpu}}
model: {{{model}, layers: 2, width: 32}}
objective: {{kind: {objective}}}
data: {{path: {data}, sequence_length: {length}, global_batch_rows: 8}}
optim: {{lr: 5e-3, matrix_lr_multiplier: 1.0, warmup_steps: 2, weight_decay: 1e-3, clip_norm: 0.5}}
parallel: {{zero: 0}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 4, tensorboard: false}}
"""
MODELS = {
    "sigmoid": "family: sigmoid, heads: 4, kv_heads: 2, mlp_width: 64",
    "softmax": "family: softmax, heads: 4, mlp_width: 64, positions: rope, tied_head: false, layer_scale: 0.5",
    "gru": "family: pararnn, cell: gru, heads: 4, mlp_width: 64, newton: {iterations: 6}",
    "lstm": "family: pararnn, cell: lstm, heads: 4, mlp_width: 64, newton: {iterations: 6}",
    "mamba2": "family: mamba2, heads: 8, state_width: 8, chunk: 8, groups: 2",
    "trimodal": "family: trimodal, heads: 4, mlp_width: 64, image_positions: 2d",
}


@dataclass(frozen=True)
class Curve:
    losses: dict[int, float]
    gradient_norms: list[float]


@dataclass(frozen=True)
class Datasets:
    """text: a dataset; pairs: the folders of text and pairs."""

    text: Path
    pairs: tuple[Path, ...]


def write_run(folder: Path, data: Datasets, model: str, steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    several = model == "trimodal"
    path = folder / "tiny.yaml"
    path.write_text(
        RUN.format(
            folder=folder / "runs",
            data="[" + ", ".join(map(str, data.pairs)) + "]" if several else data.text,
            objective="masked_diffusion" if several else "next_token",
            length=40 if several else 32,
            model=MODELS[model],
            steps=steps,
        )
    )
    return path


def train_in(
    folder: Path, data: Datasets, model: str, world: int, settings: Sequence[str], steps: int = 6
) -> Curve:
    """Train on `world` ranks."""
    config = write_run(folder, data, model, steps)
    trained = run_ranks(world, train_rank, config, list(settings), timeout_s=150)
    assert all(rank.gradient_norms == trained[0].gradient_norms for rank in trained)
    return Curve(losses(folder / "runs" / "tiny"), trained[0].gradient_norms)


def agree(one: Curve, other: Curve) -> None:
    """Losses to five digits, norms to four."""
    assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-5)
    assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-4)


def difference(one: Curve, other: Curve) -> tuple[float, float]:
    """The greatest relative differences of losses and of gradient norms."""
    assert one.losses.keys() == other.losses.keys()
    losses_ = max(abs(one.losses[step] / other.losses[step] - 1) for step in one.losses)
    norms = zip(one.gradient_norms, other.gradient_norms, strict=True)
    return losses_, max(abs(a / b - 1) for a, b in norms)
