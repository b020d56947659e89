"""Replicas in any ZeRO stage train as one process does. `tests/pretrain/parallel` has two replicas and all axes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.training import losses, train_rank, write_config
from tests.harness import run_ranks

OVERRIDES = ["checkpoint.save_every_steps=null", "data.micro_batch_rows=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[dict[int, float], list[float]]:
    """One process, ZeRO 0, the whole batch at once: losses and gradient norms."""
    folder = tmp_path_factory.mktemp("alone")
    trained = run_ranks(1, train_rank, write_config(folder, corpus), ["parallel.zero=0", *OVERRIDES[:1]])
    return losses(folder / "runs" / "tiny"), trained[0].gradient_norms


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (1, 2), (1, 3), (4, 0), (4, 1), (4, 3)])
def test_the_loss_curve_is_that_of_one_process(
    tmp_path: Path, corpus: Path, alone: tuple[dict[int, float], list[float]], world: int, zero: int
) -> None:
    trained = run_ranks(
        world, train_rank, write_config(tmp_path, corpus), [f"parallel.zero={zero}", *OVERRIDES]
    )
    expected_losses, expected_norms = alone
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(expected_losses, abs=1e-5)
    assert trained[0].gradient_norms == pytest.approx(expected_norms, rel=1e-4)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_stays_near_fp32(
    tmp_path: Path, corpus: Path, alone: tuple[dict[int, float], list[float]], zero: int
) -> None:
    settings = [f"parallel.zero={zero}", "precision.dtype=bf16", *OVERRIDES]
    run_ranks(2, train_rank, write_config(tmp_path, corpus), settings)
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(alone[0], abs=2e-2)


@pytest.mark.parametrize(
    "option", ["parallel.activation_checkpointing=full", "data.workers=2", "objective.z_loss=0"]
)
def test_options_that_must_not_change_the_loss(
    tmp_path: Path, corpus: Path, alone: tuple[dict[int, float], list[float]], option: str
) -> None:
    run_ranks(
        2, train_rank, write_config(tmp_path, corpus), [option, "parallel.zero=3", *OVERRIDES], timeout_s=120
    )
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(alone[0], abs=1e-5)


def test_without_clipping(tmp_path: Path, corpus: Path) -> None:
    curves = []
    for zero, world in ((0, 1), (1, 2), (3, 2)):
        folder = tmp_path / f"zero{zero}"
        folder.mkdir()
        settings = [f"parallel.zero={zero}", "optim.clip_norm=null", *OVERRIDES]
        trained = run_ranks(world, train_rank, write_config(folder, corpus), settings)
        curves.append((losses(folder / "runs" / "tiny"), trained[0].gradient_norms))
    for curve, norms in curves[1:]:
        assert curve == pytest.approx(curves[0][0], abs=1e-5)
        assert norms == pytest.approx(curves[0][1], rel=1e-4)
