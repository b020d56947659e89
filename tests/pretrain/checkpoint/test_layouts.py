"""A checkpoint saved in one layout continues in another, with the losses of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.checkpoint.training import Layout, resume, save_after

SAVED_AT = 3
STEPS = 6


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[float]]:
    """Losses of one process without ZeRO, with the head untied and tied."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        tied: run_ranks(1, save_after, Layout(0, tied=tied), folder / str(tied), SAVED_AT, STEPS)[0]
        for tied in (False, True)
    }


# Each case saves at (ranks, stage) and loads at several others, so that all pairs of stages and sizes are
# met.
CASES = [
    (1, 0, False, [(2, 3), (4, 1)]),
    (2, 1, False, [(1, 0), (4, 2), (2, 3)]),
    (2, 2, True, [(1, 1), (2, 0), (4, 3)]),
    (4, 3, False, [(2, 2), (1, 3), (4, 0)]),
    (2, 3, True, [(1, 2), (2, 1)]),
    (2, 0, True, [(1, 0), (2, 2)]),
]


@pytest.mark.parametrize(("ranks", "zero", "tied", "others"), CASES)
def test_any_layout_loads_in_any_other(
    ranks: int,
    zero: int,
    tied: bool,
    others: list[tuple[int, int]],
    tmp_path: Path,
    uninterrupted: dict[bool, list[float]],
) -> None:
    expected = uninterrupted[tied]
    saved = run_ranks(ranks, save_after, Layout(zero, tied=tied), tmp_path, SAVED_AT, STEPS)
    assert saved[0] == pytest.approx(expected, abs=1e-5)
    for other_ranks, other_zero in others:
        results = run_ranks(other_ranks, resume, Layout(other_zero, tied=tied), tmp_path, STEPS)
        for rank, result in enumerate(results):
            assert result["losses"] == pytest.approx(expected[SAVED_AT:], abs=1e-5)
            assert set(result["steps"].values()) <= {float(STEPS)}
            assert result["meta"] == {"step": SAVED_AT}
            assert result["rank_bytes"] == (f"rank {rank}".encode() if other_ranks == ranks else None)


@pytest.mark.parametrize(
    "layout", [*(Layout(zero) for zero in range(4)), *(Layout(z, bf16=True) for z in (1, 2, 3))]
)
def test_the_same_layout_continues_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    expected = run_ranks(2, save_after, layout, tmp_path, SAVED_AT, STEPS)[0]
    assert run_ranks(2, resume, layout, tmp_path, STEPS)[0]["losses"] == expected[SAVED_AT:]
