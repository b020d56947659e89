"""A checkpoint saved in one layout continues in another, with the losses of the uninterrupted run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import CheckpointStore, TrainingState
from pretrain.checkpoint.boxes import Boxes
from pretrain.checkpoint.staging import Stager, Views
from pretrain.engine.fragments import deepspeed_fragments, refresh_weights
from pretrain.errors import CheckpointError
from tests.harness import run_ranks
from tests.pretrain.checkpoint.training import (
    Layout,
    make_engine,
    open_store,
    plain_model,
    resume,
    save_after,
    save_twice,
)

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
    "layout",
    [
        *(Layout(zero) for zero in range(4)),
        *(Layout(z, bf16=True) for z in (1, 2, 3)),
        Layout(1, bf16=True, fp32_accumulation=True),
    ],
)
def test_the_same_layout_continues_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    expected = run_ranks(2, save_after, layout, tmp_path, SAVED_AT, STEPS)[0]
    assert run_ranks(2, resume, layout, tmp_path, STEPS)[0]["losses"] == expected[SAVED_AT:]


@pytest.mark.parametrize(
    "layout", [*(Layout(zero) for zero in range(4)), *(Layout(z, bf16=True) for z in (1, 2, 3))]
)
def test_an_asynchronous_save_is_a_synchronous_one_bit_for_bit(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, wait_staged = Stager.stage, CheckpointStore.wait_staged
    asked = threading.Event()

    def stage_late(self: Stager, views: Views) -> dict[str, Boxes]:
        if self._copies:  # not before the update asks for it, which then has to wait
            assert asked.wait(60)
            time.sleep(0.2)
        return stage(self, views)

    def ask(self: CheckpointStore) -> float:
        if self._staged is not None:
            asked.set()
        return wait_staged(self)

    monkeypatch.setattr(Stager, "stage", stage_late)
    monkeypatch.setattr(CheckpointStore, "wait_staged", ask)
    for waits in run_ranks(2, save_twice, layout, tmp_path, SAVED_AT, STEPS):
        assert waits[0] > 0.1 and not any(waits[1:])
    steps = [tmp_path / name / f"step_{SAVED_AT:08d}" for name in ("sync", "async")]
    names = sorted(path.name for path in steps[0].glob("*.distcp"))
    assert names == ["__0_0.distcp", "__1_0.distcp"]
    for name in names:
        assert (steps[0] / name).read_bytes() == (steps[1] / name).read_bytes()


def refusal(layout: Layout, frozen: bool) -> str:
    engine, placements = make_engine(layout)
    if frozen:
        engine.module.norm.weight.requires_grad_(False)
    with pytest.raises(CheckpointError) as caught:
        deepspeed_fragments(engine, placements)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "frozen", "message"),
    [(Layout(0, bf16=True), False, "parallel.zero=1"), (Layout(0), True, "norm.weight is frozen")],
)
def test_what_cannot_be_saved_exactly_is_refused(layout: Layout, frozen: bool, message: str) -> None:
    assert message in run_ranks(1, refusal, layout, frozen)[0]


def weights_after_loading(layout: Layout, folder: Path) -> bool:
    """Whether the engine's weights are the stored masters, as a plain model has them."""
    import deepspeed

    engine, placements = make_engine(layout)
    store = open_store(folder)
    path = store.latest()
    assert path is not None
    store.load(path, TrainingState(deepspeed_fragments(engine, placements)))
    refresh_weights(engine)
    plain = plain_model(layout)
    store.load_weights(path, dict(plain.named_parameters()))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=layout.zero == 3):
        pairs = zip(engine.module.parameters(), plain.parameters(), strict=True)
        return all(torch.equal(weight, master.to(weight.dtype)) for weight, master in pairs)


@pytest.mark.parametrize("layout", [Layout(0), Layout(1, bf16=True), Layout(2), Layout(3, bf16=True)])
def test_weights_follow_the_loaded_masters(layout: Layout, tmp_path: Path) -> None:
    run_ranks(1, save_after, Layout(1), tmp_path, SAVED_AT, SAVED_AT)
    assert run_ranks(2, weights_after_loading, layout, tmp_path) == [True, True]
