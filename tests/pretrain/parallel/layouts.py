"""Tiny runs of every family, for layouts to be compared with one process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipelines.build import BuildOptions, build
from tests.e2e.training import metrics, train_rank
from tests.e2e.trimodal import write_tiny_config
from tests.harness import run_ranks

MODELS = {
    "sigmoid": "{family: sigmoid, layers: 2, width: 32, heads: 4, kv_heads: 2, mlp_width: 64, positions: alibi}",
    "sigmoid-rope": "{family: sigmoid, layers: 2, width: 32, heads: 4, mlp_width: 64, positions: rope}",
    "softmax": "{family: softmax, layers: 2, width: 32, heads: 4, kv_heads: 4, mlp_width: 64, positions: alibi}",
    "softmax-rope": "{family: softmax, layers: 2, width: 32, heads: 8, kv_heads: 4, mlp_width: 64, positions: rope}",
    "gru": "{family: pararnn, cell: gru, layers: 2, width: 32, heads: 2, mlp_width: 64}",
    "lstm": "{family: pararnn, cell: lstm, layers: 2, width: 32, heads: 2, mlp_width: 64}",
    "elman": "{family: pararnn, cell: elman, layers: 2, width: 32, heads: 2, block: mixer, mlp_width: 0}",
    "mamba2": "{family: mamba2, layers: 2, width: 32, heads: 4, state_width: 8, chunk: 8}",
}
SETTINGS = """
run: {{name: tiny, folder: {folder}, steps: 20, device: cpu}}
model: {model}
data: {{path: {data}, sequence_length: 32, global_batch_rows: 8, micro_batch_rows: 2}}
optim: {{lr: 5e-3, warmup_steps: 3, weight_decay: 1e-3, clip_norm: 0.5}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 1, evaluate_every_steps: 10, evaluate_rows: 8, sample_tokens: 4, tensorboard: false}}
"""


def build_short_documents(folder: Path) -> Path:
    """Tokenised text of one to sixty bytes per document: rows of 32 tokens hold several, and cuts lie in some."""
    texts, source = folder / "texts", random.Random(3)
    texts.mkdir()
    for number in range(400):
        words = " ".join(source.choice(("one", "two", "three", "four")) for _ in range(source.randint(1, 12)))
        (texts / f"{number:03d}.txt").write_text(words)
    build(texts, folder / "data", BuildOptions(tokenizer="bytes"))
    return folder / "data"


@dataclass(frozen=True)
class Curve:
    """What a run logged by step, training and validation alike, and its gradient norms."""

    logged: dict[str, float]
    norms: list[float]


def train(folder: Path, config: Path, ranks: int, overrides: list[str], stop_at: int | None = None) -> Curve:
    """Run the config in `folder` on so many ranks, from its newest checkpoint if there is one."""
    trained = run_ranks(
        ranks, train_rank, config, [f"run.folder={folder}", *overrides], stop_at, timeout_s=240
    )
    shown = ("loss/", "elbo", "cross_entropy/", "validation_", "newton/residual_mean")
    logged = {
        f"{record['step']} {name}": value
        for record in metrics(folder / "tiny")
        for name, value in record.items()
        if name.startswith(shown)
    }
    return Curve(logged, trained[0].gradient_norms)


def text_config(folder: Path, model: str, data: Path) -> Path:
    path = folder / f"{model}.yaml"
    path.write_text(SETTINGS.format(folder=folder / "runs", model=MODELS[model], data=data))
    return path


def trimodal_config(folder: Path, data: Path) -> Path:
    path = write_tiny_config(folder, data)
    settings = (
        path.read_text().replace("steps: 4", "steps: 8").replace("log_every_steps: 2", "log_every_steps: 1")
    )
    settings = settings.replace("evaluate_every_steps: null", "evaluate_every_steps: 4")
    path.write_text(settings.replace("tensorboard: true", "tensorboard: false"))
    return path


def assert_equal(curve: Curve, expected: Curve) -> None:
    """Losses to five digits, gradient norms too."""
    assert curve.logged == pytest.approx(expected.logged, rel=1e-5, abs=1e-5)
    assert curve.norms == pytest.approx(expected.norms, rel=1e-5)
