"""The plan against what ranks of the real engines hold and send; `benchmarks.plan` has the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan import compare
from tests.pretrain.parallel.runs import Datasets, build_datasets, import_megatron


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    import_megatron()
    return build_datasets(tmp_path_factory.mktemp("data"))


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
def test_memory_and_traffic_are_as_planned(model: str, layout: str, data: Datasets, tmp_path: Path) -> None:
    found = compare(tmp_path, data, model, layout)
    assert found["planned_over_measured"] == pytest.approx(1, abs=0.05)
    assert found["planned_traffic"] == found["measured_traffic"]
