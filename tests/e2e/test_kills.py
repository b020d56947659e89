"""Random kills of real runs under torchrun; `python -m benchmarks.kills` does two hundred, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kills import drill_all

DEEPSPEED, MEGATRON = "2 ranks, ZeRO 3", "2 ranks, Megatron, ZeRO 1"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("layouts", "kills"),
    [
        pytest.param([DEEPSPEED, MEGATRON], 4, id="four"),
        pytest.param(["1 rank, ZeRO 0", DEEPSPEED, MEGATRON], 10, id="ten", marks=pytest.mark.slow),
    ],
)
def test_random_kills_leave_the_weights_bit_equal(tmp_path: Path, layouts: list[str], kills: int) -> None:
    outcomes = drill_all(layouts, kills, seed=1, lanes=1, folder=tmp_path, show=False)
    assert [one.problem for one in outcomes] == [""] * len(layouts), outcomes
    assert all(one.bit_equal for one in outcomes) and sum(one.kills for one in outcomes) == kills
