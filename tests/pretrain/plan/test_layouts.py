"""Layouts that are suggested."""

from __future__ import annotations

import pytest

from pretrain.config import load_config
from pretrain.hardware import ACCELERATORS
from pretrain.plan.estimate import plan_layout
from pretrain.plan.layouts import GIB, ROOM, suggest_layouts
from pretrain.plan.parameters import resolved

MODEL = [
    "model.vocabulary=512",
    "model.layers=4",
    "model.width=256",
    "model.heads=4",
    "data.sequence_length=128",
    "data.micro_batch_rows=auto",
]


@pytest.mark.parametrize(
    "asked",
    [
        [],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.data=8"],
        ["parallel.zero=3", "parallel.zero_group=node", "launch.gpus_per_node=4"],
    ],
)
def test_suggestions_are_layouts_whose_plans_they_are(asked: list[str]) -> None:
    path, accelerator = "configs/sigmoid/85m.yaml", ACCELERATORS["h100"]
    found = suggest_layouts(load_config(path, [*MODEL, *asked]), 16, accelerator)
    assert found and [one.layout.time.total for one in found] == sorted(
        one.layout.time.total for one in found
    )
    assert len({one.division for one in found}) == len(found)
    if "parallel.zero_group=node" in asked:
        # Four tensor ranks would leave a node one replica, which is refused.
        assert max(tensor for tensor, _, _ in (one.division for one in found)) == 2
    for one in found[:2]:
        config = resolved(load_config(path, [*MODEL, *asked, *one.settings.split()]))
        parallel = config.parallel
        assert (parallel.tensor, parallel.context, parallel.pipeline) == one.division
        exact = plan_layout(config, 16, accelerator)
        assert one.layout.memory.total == pytest.approx(exact.memory.total, rel=0.1)
        assert one.layout.time.total == pytest.approx(exact.time.total, rel=0.1)
        assert one.layout.memory.total <= ROOM * accelerator.memory_gib * GIB


def test_a_model_that_fits_nowhere_has_none() -> None:
    config = load_config("configs/sigmoid/7b.yaml")
    assert suggest_layouts(config, 1, ACCELERATORS["h100"]) == []
