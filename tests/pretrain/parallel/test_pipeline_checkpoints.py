"""A run goes on in another layout and on the other engine as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.loop import train
from pretrain.run import Run
from tests.e2e.training import losses
from tests.pretrain.parallel.pipelines import run_in
from tests.pretrain.parallel.runs import Datasets, References, read_curve
from tests.pretrain.parallel.table import CHUNKS, LAYERS, MICRO, PIPELINE

STEPS, ASKED_AT, SAVED_AT = 6, 3, 4  # the ranks agree to stop one step later
SHARDED = "parallel.zero=1"
Layout = tuple[int, list[str]]
DEEPSPEED_ALONE: Layout = (1, ["parallel.zero=1"])
DEEPSPEED_ZERO_3: Layout = (2, ["parallel.zero=3"])
PIPELINE_SHARDED: Layout = (4, [PIPELINE, SHARDED])
INTERLEAVED: Layout = (2, [PIPELINE, CHUNKS])
WITH_TENSORS: Layout = (4, [PIPELINE, SHARDED, "parallel.tensor=2"])
WITH_CONTEXT: Layout = (4, [PIPELINE, SHARDED, "parallel.context=2"])
WITHOUT_PIPELINE: Layout = (2, ["parallel.engine=megatron", SHARDED])


def first_step_and_train(run: Run) -> tuple[int, set[float]]:
    """Where the run began, and Adam's step counts at its end."""
    first = run.clock.step
    train(run)
    return first, {fragment.step.item() for fragment in run.engine.fragments()}


def go_on(folder: Path, data: Datasets, model: str, layout: Layout, stop_at: int | None = None) -> None:
    world, settings = layout
    ended = run_in(
        folder,
        data,
        model,
        world,
        [MICRO, *settings],
        first_step_and_train,
        steps=STEPS,
        stop_at=stop_at,
    )
    begun, done = (0, SAVED_AT) if stop_at else (SAVED_AT, STEPS)
    assert all(first == begun and steps <= {float(done)} for first, steps in ended), ended


CASES = [
    ("sigmoid", PIPELINE_SHARDED, [DEEPSPEED_ZERO_3, INTERLEAVED]),
    ("sigmoid", DEEPSPEED_ZERO_3, [PIPELINE_SHARDED]),
    ("lstm", WITH_TENSORS, [DEEPSPEED_ALONE]),
]


EVERY = [PIPELINE_SHARDED, INTERLEAVED, WITH_TENSORS, WITHOUT_PIPELINE, WITH_CONTEXT]
CASES_OF_ALL = [
    (model, saved, [other for other in [*EVERY, DEEPSPEED_ALONE, DEEPSPEED_ZERO_3] if other is not saved])
    for model in ("sigmoid", "lstm", "trimodal")
    for saved in [*EVERY, DEEPSPEED_ZERO_3]
]


@pytest.mark.parametrize(
    ("model", "saved", "others"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES_OF_ALL)],
)
def test_a_checkpoint_goes_on_anywhere(
    tmp_path: Path, data: Datasets, alone: References, model: str, saved: Layout, others: list[Layout]
) -> None:
    expected = alone(model, [LAYERS], STEPS).losses
    go_on(tmp_path / "saved", data, model, saved, ASKED_AT)
    for number, layout in enumerate(others):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "saved", folder)
        go_on(folder, data, model, layout)
        assert read_curve(folder, []).losses == pytest.approx(expected, rel=1e-5), layout


def test_the_same_layout_continues_bit_for_bit(tmp_path: Path, data: Datasets) -> None:
    """In bf16, so that masters must come back exactly."""
    world, settings = PIPELINE_SHARDED
    layout = (world, [*settings, "precision.dtype=bf16"])
    run_in(tmp_path / "whole", data, "sigmoid", world, [MICRO, *layout[1]], first_step_and_train, steps=STEPS)
    go_on(tmp_path / "cut", data, "sigmoid", layout, ASKED_AT)
    go_on(tmp_path / "cut", data, "sigmoid", layout)
    assert losses(tmp_path / "cut" / "runs" / "tiny") == losses(tmp_path / "whole" / "runs" / "tiny")


def written(run: Run) -> tuple[list[str], list[str]]:
    """Names that this rank saves, and those that it only loads."""
    fragments = run.engine.fragments()
    return [f.name for f in fragments if f.is_saved], [f.name for f in fragments if not f.is_saved]


def test_a_tied_embedding_is_saved_by_the_first_stage(tmp_path: Path, data: Datasets) -> None:
    (first, _), (last, loaded) = run_in(tmp_path, data, "sigmoid", 2, [MICRO, PIPELINE], written)
    assert "embedding.weight" in first and "embedding.weight" not in last
    assert loaded == ["embedding.weight"]
    assert not any(name.startswith("head.") for name in first + last)
