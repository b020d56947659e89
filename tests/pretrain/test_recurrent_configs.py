"""The shipped ParaRNN and Mamba-2 runs are the paper's: sizes, learning rates, decay, tokens."""

from __future__ import annotations

import pytest
import torch

from models import families
from pretrain.config import load_config
from pretrain.config.objective import NextTokenSection

SHARED = ("betas", "epsilon", "clip_norm", "schedule", "final_lr_fraction", "matrix_lr_multiplier")
# Tables 3 and 4: parameters, iterations, tokens per step, weight decay; learning rates of GRU, LSTM, Mamba-2.
PAPER = {
    "400m": (406e6, 20_000, 0.524e6, 1e-3, (5e-3, 3e-3, 5e-3)),
    "1b": (1.42e9, 55_000, 0.524e6, 1e-4, (3e-3, 3e-3, 5e-3)),
    "3b": (2.90e9, 55_000, 1.05e6, 1e-4, (2e-3, 2e-3, 3e-3)),
    "7b": (6.76e9, 33_000, 4.19e6, 1e-4, (3e-3, 3e-3, 3e-3)),
}
MAMBA2 = {"400m": 409e6, "1b": 1.43e9, "3b": 2.83e9, "7b": 6.96e9}


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("number", range(3))
def test_a_run_is_the_papers(size: str, number: int) -> None:
    folder = ("pararnn/gru", "pararnn/lstm", "mamba2")[number]
    parameters, steps, tokens, decay, rates = PAPER[size]
    config = load_config(f"configs/{folder}/{size}.yaml")
    family = families[config.model.family]
    with torch.device("meta"):
        model = family.build(config.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(MAMBA2[size] if number == 2 else parameters, rel=4e-3)
    assert config.run.steps == steps and config.optim.warmup_steps == steps // 10
    assert config.data.global_batch_rows * config.data.sequence_length == pytest.approx(tokens, rel=2e-3)
    assert config.optim.lr == rates[number]
    assert config.optim.weight_decay == pytest.approx(decay * rates[number])
    assert isinstance(config.objective, NextTokenSection)
    assert config.objective.z_loss == (5e-6 if size == "7b" else 1e-4)
    for key in SHARED:
        assert getattr(config.optim, key) == family.recipe[key], key


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_demo_is_the_sigmoid_demos_twin(cell: str) -> None:
    ours, theirs = load_config(f"configs/pararnn/{cell}/demo.yaml"), load_config("configs/sigmoid/demo.yaml")
    assert (ours.model.cell, ours.run.steps) == (cell, theirs.run.steps)
    assert (ours.model.layers, ours.model.width) == (theirs.model.layers, theirs.model.width)
    assert ours.data == theirs.data and ours.monitor == theirs.monitor
