"""Tiny runs of every family, for comparing layouts with one process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipelines.prepare.text import BuildOptions, build
from pretrain.imports import quick_and_quiet
from tests.e2e.pairs import TASKS, build_pairs
from tests.e2e.training import metrics, train_rank
from tests.harness import run_ranks

RUN = """
run: {{name: tiny, folder: {folder}, steps: {steps}, device: cpu}}
model: {{{model}, layers: 2, width: 32}}
objective: {{kind: {objective}}}
data: {{path: {data}, sequence_length: {length}, global_batch_rows: 8}}
optim: {{lr: 5e-3, matrix_lr_multiplier: 1.0, warmup_steps: 2, weight_decay: 1e-3, clip_norm: 0.5, epsilon: 1e-6}}
parallel: {{zero: 0}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 4, tensorboard: false}}
"""
"""Adam's first update divides a gradient by its own size: with its usual epsilon, what rounding makes of a gradient
near zero is an update of full size."""
MODELS = {
    "sigmoid": "family: sigmoid, heads: 4, kv_heads: 2, mlp_width: 64",
    "softmax": "family: softmax, heads: 4, mlp_width: 64, positions: rope, tied_head: false, layer_scale: 0.5",
    "gru": "family: pararnn, cell: gru, heads: 4, mlp_width: 64, newton: {iterations: 6}",
    "lstm": "family: pararnn, cell: lstm, heads: 4, mlp_width: 64, newton: {iterations: 6}",
    "mamba2": "family: mamba2, heads: 8, state_width: 8, chunk: 8, groups: 2",
    "trimodal": "family: trimodal, heads: 4, mlp_width: 64, image_positions: 2d",
    "gru and sigmoid": "family: hybrid, mixers: [pararnn_gru, sigmoid], mlp_width: 64, "
    "pararnn_gru: {heads: 4, newton: {iterations: 6}}, sigmoid: {heads: 4, kv_heads: 2}",
    "mamba2 and softmax": "family: hybrid, mixers: [mamba2, softmax], mlp_width: 64, tied_head: true, "
    "mamba2: {heads: 8, state_width: 8, chunk: 8, groups: 2}, softmax: {heads: 4, positions: rope}",
}
SHOWN = ("loss/", "elbo", "cross_entropy/", "validation_", "newton/residual_mean")


@dataclass(frozen=True)
class Curve:
    """What a run logged of its losses, training and validation alike, by step and name; and its gradient norms."""

    logged: dict[str, float]
    gradient_norms: list[float]

    @property
    def losses(self) -> dict[str, float]:
        """Training and validation losses over all tokens."""
        return {k: v for k, v in self.logged.items() if k.endswith((" loss/train", " loss/validation"))}


@dataclass(frozen=True)
class Datasets:
    """text: a dataset; pairs: the folders of text and pairs."""

    text: Path
    pairs: tuple[Path, ...]


def build_datasets(folder: Path) -> Datasets:
    build_pairs(folder / "pairs")
    pairs = tuple(folder / "pairs" / name for name in ("text", *TASKS))
    return Datasets(build_short_documents(folder), pairs)


def build_short_documents(folder: Path) -> Path:
    """Tokenised text of three to sixty bytes per document: rows of 32 tokens hold several, and cuts lie in some."""
    texts, source = folder / "texts", random.Random(3)
    texts.mkdir()
    for number in range(400):
        words = " ".join(source.choice(("one", "two", "three", "four")) for _ in range(source.randint(1, 12)))
        (texts / f"{number:03d}.txt").write_text(words)
    build(texts, folder / "data", BuildOptions(tokenizer="bytes"))
    return folder / "data"


def import_megatron() -> None:
    """In the process that forks the ranks: what would cost each of them seconds."""
    with quick_and_quiet():
        import megatron.core.distributed
        import megatron.core.optimizer.distrib_optimizer
        import megatron.core.pipeline_parallel.schedules
        import megatron.core.transformer.multi_token_prediction  # noqa: F401


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
    folder: Path,
    data: Datasets,
    model: str,
    world: int,
    settings: Sequence[str],
    steps: int = 6,
    stop_at: int | None = None,
) -> Curve:
    """Train on `world` ranks, from the folder's newest checkpoint if there is one; the norms are of this part."""
    config = write_run(folder, data, model, steps)
    trained = run_ranks(world, train_rank, config, list(settings), stop_at, timeout_s=240)
    assert all(rank.gradient_norms == trained[0].gradient_norms for rank in trained)
    return read_curve(folder, trained[0].gradient_norms)


def read_curve(folder: Path, gradient_norms: list[float]) -> Curve:
    """All that the folder's run has logged so far."""
    logged = {
        f"{record['step']} {name}": value
        for record in metrics(folder / "runs" / "tiny")
        for name, value in record.items()
        if name.startswith(SHOWN)
    }
    return Curve(logged, gradient_norms)


def agree(one: Curve, other: Curve) -> None:
    """To five digits."""
    assert one.logged == pytest.approx(other.logged, rel=1e-5, abs=1e-5)
    assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-5)


def difference(one: Curve, other: Curve) -> tuple[float, float]:
    """The greatest relative differences of losses and of gradient norms."""
    assert one.losses.keys() == other.losses.keys()
    losses = max(abs(one.losses[step] / other.losses[step] - 1) for step in one.losses)
    norms = zip(one.gradient_norms, other.gradient_norms, strict=True)
    return losses, max(abs(a / b - 1) for a, b in norms)


class References:
    """Curves of one process without ZeRO, the whole batch at once; each is trained once."""

    def __init__(self, folder: Path, data: Datasets) -> None:
        self._folder, self._data = folder, data
        self._known: dict[tuple[str, ...], Curve] = {}

    def __call__(self, model: str, settings: Sequence[str] = (), steps: int = 6) -> Curve:
        key = (model, str(steps), *settings)
        if key not in self._known:
            folder = self._folder / str(len(self._known))
            self._known[key] = train_in(folder, self._data, model, 1, settings, steps)
        return self._known[key]
