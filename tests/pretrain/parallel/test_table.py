"""Every family trains and evaluates in every layout as in one process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.pretrain.parallel.runs import MODELS, Datasets, References, agree, train_in
from tests.pretrain.parallel.table import LAYERS, LAYOUTS, TENSOR

SAMPLE = [
    ("sigmoid", "dp2 ZeRO 1"),
    ("softmax", "dp2 ZeRO 2"),
    ("sigmoid", "tp2"),
    ("sigmoid", "megatron dp2 ZeRO 1"),
    ("sigmoid", "tp2 sp cp2"),
    ("softmax", "tp2 sp dp2 ZeRO 3"),
    ("softmax", "cp2 ZeRO 3"),
    ("gru", "tp2 sp"),
    ("gru", "cp2 pp2"),
    ("lstm", "cp2 summaries"),
    ("lstm", "tp2 sp pp2 interleaved ZeRO 1"),
    ("mamba2", "tp4 sp"),
    ("mamba2", "cp2"),
    ("trimodal", "tp2 sp dp2 ZeRO 2"),
    ("trimodal", "pp2 interleaved dp2 ZeRO 1"),
    ("gru and sigmoid", "tp2 sp cp2"),
    ("gru and sigmoid", "cp2 summaries beside attention"),
    ("mamba2 and softmax", "cp2 pp2"),
    ("mamba2 and softmax", "tp2 sp dp2 ZeRO 3"),
]
WHOLE = [
    (model, layout) for model, layout in itertools.product(MODELS, LAYOUTS) if LAYOUTS[layout].suits(model)
]


def compare(folder: Path, data: Datasets, alone: References, model: str, layout: str, steps: int) -> None:
    one = LAYOUTS[layout]
    curve = train_in(folder, data, model, one.ranks, [LAYERS, *one.settings], steps)
    agree(curve, alone(model, [LAYERS, *one.alone], steps))


@pytest.mark.parametrize(("model", "layout"), SAMPLE)
def test_a_sample_of_the_table(
    tmp_path: Path, data: Datasets, alone: References, model: str, layout: str
) -> None:
    compare(tmp_path, data, alone, model, layout, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), WHOLE)
def test_the_whole_table(tmp_path: Path, data: Datasets, alone: References, model: str, layout: str) -> None:
    compare(tmp_path, data, alone, model, layout, 20)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["parallel.activation_checkpointing=full", "parallel.compile=true"])
@pytest.mark.parametrize(
    ("model", "layout"), [("sigmoid", "tp2 sp dp2 ZeRO 2"), ("trimodal", "cp2"), ("gru", "pp2 interleaved")]
)
def test_options_change_nothing(
    tmp_path: Path, data: Datasets, alone: References, model: str, layout: str, option: str
) -> None:
    one = LAYOUTS[layout]
    agree(train_in(tmp_path, data, model, one.ranks, [LAYERS, *one.settings, option]), alone(model, [LAYERS]))


def test_the_sample_has_every_family_and_every_axis() -> None:
    assert {model for model, _ in SAMPLE} == {*MODELS}
    axes = ["megatron", "dp2", "tp2", "tp4", "sp", "cp2", "pp2", "interleaved", "summaries"]
    assert {word for _, layout in SAMPLE for word in layout.split()} >= {*axes, "1", "2", "3"}
    assert TENSOR in LAYOUTS["tp2"].settings
