"""The plan against what ranks of the real engines hold and send; `benchmarks.plan` has the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan import LAYOUTS, compare, write_run
from tests.corpus import build_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    build_corpus(folder, documents=40).rename(folder / "corpus")
    return folder


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("sigmoid", "dp2 ZeRO 2, offload"),
        ("sigmoid", "dp2 ZeRO 3"),
        ("gru", "tp2 sp"),
        ("sigmoid", "pp2 interleaved"),
        ("softmax", "cp2"),
    ],
)
def test_memory_and_traffic_are_as_planned(model: str, layout: str, runs: Path) -> None:
    world, overrides = LAYOUTS[layout]
    found = compare(write_run(runs, model), world, overrides)
    assert found["planned_over_measured"] == pytest.approx(1, abs=0.05)
    assert found["planned_traffic"] == found["measured_traffic"]
