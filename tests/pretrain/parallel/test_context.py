"""Ranks that share rows train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.trimodal import build_pairs
from tests.pretrain.parallel.layouts import (
    Curve,
    assert_equal,
    build_short_documents,
    text_config,
    train,
    trimodal_config,
)

NEWTON = ["model.newton.method=newton", "model.newton.iterations=6"]
SUMMARIES = "parallel.recurrence=summaries"

Alone = Callable[[str, tuple[str, ...]], Curve]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_short_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    build_pairs(folder)
    return folder


@pytest.fixture(scope="module")
def text_alone(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> Alone:
    """One process, ZeRO 1."""

    @cache
    def run(model: str, settings: tuple[str, ...]) -> Curve:
        folder = tmp_path_factory.mktemp("alone")
        return train(folder / "runs", text_config(folder, model, documents), 1, list(settings))

    return run


def compare(
    folder: Path,
    documents: Path,
    alone: Alone,
    model: str,
    ranks: int,
    layout: list[str],
    settings: list[str],
) -> None:
    config = text_config(folder, model, documents)
    curve = train(folder / "runs", config, ranks, [*layout, *settings])
    assert_equal(curve, alone(model, tuple(settings)))


@pytest.mark.parametrize(
    ("model", "layout", "settings"),
    [
        ("sigmoid", ["parallel.context=2"], []),
        ("softmax", ["parallel.context=2", "parallel.zero=3"], []),
        ("lstm", ["parallel.context=2", SUMMARIES], NEWTON),
        ("mamba2", ["parallel.context=2", "parallel.activation_checkpointing=full"], []),
    ],
)
def test_the_loss_curve_is_that_of_one_process(
    tmp_path: Path, documents: Path, text_alone: Alone, model: str, layout: list[str], settings: list[str]
) -> None:
    compare(tmp_path, documents, text_alone, model, 2, layout, [*settings, "run.steps=8"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ranks", "layout", "settings"),
    [
        ("sigmoid", 4, ["parallel.context=4"], []),
        ("sigmoid", 4, ["parallel.context=2", "parallel.zero=3"], []),
        ("sigmoid", 4, ["parallel.context=2", "parallel.tensor=2"], []),
        ("sigmoid", 4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"], []),
        ("sigmoid-rope", 2, ["parallel.context=2", "parallel.zero=0"], []),
        ("softmax", 4, ["parallel.context=4"], []),
        ("softmax", 4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"], []),
        ("softmax-rope", 2, ["parallel.context=2", "parallel.zero=2"], []),
        ("gru", 2, ["parallel.context=2"], []),
        ("gru", 4, ["parallel.context=4", SUMMARIES], NEWTON),
        ("gru", 4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"], []),
        ("lstm", 4, ["parallel.context=2", "parallel.zero=2"], []),
        ("lstm", 4, ["parallel.context=2", "parallel.tensor=2", SUMMARIES], NEWTON),
        ("elman", 2, ["parallel.context=2"], []),
        ("elman", 2, ["parallel.context=2", SUMMARIES], NEWTON),
        ("mamba2", 2, ["parallel.context=2", "parallel.zero=3"], []),
        ("mamba2", 4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"], []),
    ],
)
def test_every_family_and_layout(
    tmp_path: Path,
    documents: Path,
    text_alone: Alone,
    model: str,
    ranks: int,
    layout: list[str],
    settings: list[str],
) -> None:
    compare(tmp_path, documents, text_alone, model, ranks, layout, settings)


@pytest.mark.parametrize(
    ("ranks", "layout", "settings"),
    [
        (2, ["parallel.context=2"], ["model.attention=sigmoid"]),
        pytest.param(2, ["parallel.context=2"], ["model.attention=softmax"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.context=2"], ["model.image_positions=1d"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.context=4"], ["model.attention=sigmoid"], marks=pytest.mark.slow),
        pytest.param(
            4,
            ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"],
            ["model.attention=sigmoid"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_masked_diffusion(
    tmp_path: Path, pairs: Path, ranks: int, layout: list[str], settings: list[str]
) -> None:
    config = trimodal_config(tmp_path, pairs)
    alone = train(tmp_path / "alone", config, 1, settings)
    assert_equal(train(tmp_path / "shared", config, ranks, [*layout, *settings]), alone)


def test_a_checkpoint_moves_between_shared_and_whole_rows(
    tmp_path: Path, documents: Path, text_alone: Alone
) -> None:
    """Two ranks of one row, one process, two ranks again: one unbroken curve."""
    config, folder = text_config(tmp_path, "sigmoid", documents), tmp_path / "runs"
    norms = []
    for ranks, stop_at in ((2, 6), (1, 13), (2, None)):
        curve = train(folder, config, ranks, [f"parallel.context={ranks}", "parallel.zero=2"], stop_at)
        norms += curve.norms
    assert_equal(Curve(curve.logged, norms), text_alone("sigmoid", ()))
