"""The optimizer in host memory: the same losses, and checkpoints that move there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.training import train_rank
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import (
    Datasets,
    References,
    agree,
    difference,
    read_curve,
    train_in,
    write_run,
)

OFFLOAD = "parallel.offload=optimizer"
STEPS = 6


@pytest.mark.parametrize(
    ("model", "world", "settings"),
    [
        ("sigmoid", 2, ["parallel.zero=1"]),
        ("sigmoid", 2, ["parallel.zero=2", "data.micro_batch_rows=2"]),
        ("gru", 2, ["parallel.zero=3", "data.micro_batch_rows=2"]),  # its bounds hold after each update
        ("sigmoid", 4, ["parallel.zero=2", "parallel.tensor=2"]),
    ],
)
def test_the_losses_are_those_of_one_process(
    tmp_path: Path, data: Datasets, alone: References, model: str, world: int, settings: list[str]
) -> None:
    agree(train_in(tmp_path, data, model, world, [OFFLOAD, *settings]), alone(model))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_is_bf16_without_it(tmp_path: Path, data: Datasets, zero: int) -> None:
    settings = [f"parallel.zero={zero}", "precision.dtype=bf16"]
    curves = [
        train_in(tmp_path / str(len(more)), data, "sigmoid", 2, settings + more) for more in ([], [OFFLOAD])
    ]
    # Norms are summed in another precision there: a last digit, which bf16's rounding of the weights then enlarges.
    losses, norms = difference(*curves)
    assert losses < 1e-3 and norms < 5e-3, (losses, norms)
    assert curves[0].gradient_norms[0] == pytest.approx(curves[1].gradient_norms[0], rel=1e-6)


def test_a_checkpoint_moves_there_and_back(tmp_path: Path, data: Datasets, alone: References) -> None:
    config = write_run(tmp_path, data, "sigmoid", STEPS)
    legs: list[tuple[int, list[str], int | None]] = [
        (2, ["parallel.zero=2", OFFLOAD], 1),
        (2, ["parallel.tensor=2", "parallel.zero=1"], 3),
        (2, ["parallel.zero=3", OFFLOAD], None),
    ]
    first = 0
    # The ranks agree to stop one step after they are asked.
    for world, settings, stop_at in legs:
        (trained, *_) = run_ranks(world, train_rank, config, settings, stop_at, timeout_s=150)
        assert trained.first_step == first
        first = STEPS if stop_at is None else stop_at + 1
        assert trained.last_step == first
    assert read_curve(tmp_path, []).losses == pytest.approx(alone("sigmoid").losses, rel=1e-5, abs=1e-5)
