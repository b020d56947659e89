"""The Megatron engine's layouts train, evaluate and generate as one process of DeepSpeed's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.loop import train
from pretrain.run import Run
from tests.harness import RanksFailed
from tests.pretrain.parallel.pipelines import run_in, watch
from tests.pretrain.parallel.runs import MODELS, Datasets, References, agree, train_in
from tests.pretrain.parallel.table import CHUNKS, LAYERS, LAYOUTS, MICRO, PIPELINE

SHARDED = "parallel.zero=1"
UNTIED = "model.tied_head=false"


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["pp2 1F1B", "pp2 interleaved dp2 ZeRO 1", "tp2 sp pp2 ZeRO 1"])
@pytest.mark.parametrize("model", MODELS)
def test_heads_of_both_kinds_train_as_in_one_process(
    tmp_path: Path, data: Datasets, alone: References, model: str, layout: str, tied: bool
) -> None:
    shared = [LAYERS, f"model.tied_head={str(tied).lower()}"]
    curve = train_in(tmp_path, data, model, LAYOUTS[layout].ranks, [*shared, *LAYOUTS[layout].settings], 20)
    agree(curve, alone(model, shared, 20))


def test_options_do_what_they_do_in_one_process(tmp_path: Path, data: Datasets, alone: References) -> None:
    changes = [UNTIED, "optim.clip_norm=null", "model.layers=5"]
    layout = [PIPELINE, "parallel.activation_checkpointing=full", "data.micro_batch_rows=auto"]
    agree(train_in(tmp_path, data, "sigmoid", 2, [*changes, *layout]), alone("sigmoid", changes))


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_as_without_a_pipeline(tmp_path: Path, data: Datasets) -> None:
    bf16 = [LAYERS, MICRO, SHARDED, "precision.dtype=bf16"]
    plain = train_in(tmp_path / "plain", data, "sigmoid", 2, bf16, steps=20)
    staged = train_in(tmp_path / "staged", data, "sigmoid", 4, [PIPELINE, *bf16], steps=20)
    assert staged.losses == pytest.approx(plain.losses, rel=3e-3)


# 24 rows are 12 micro-batches, which the interleaved schedule of 2 x 2 takes in groups of 8 and 4; of 7 rows it takes
# 3 micro-batches with one that is not counted, and the last row twice.
@pytest.mark.parametrize(("model", "rows"), [("gru", 7), ("trimodal", 24)])
def test_evaluation_and_inference_are_those_of_one_process(
    tmp_path: Path, data: Datasets, model: str, rows: int
) -> None:
    settings = [MICRO, f"monitor.evaluate_rows={rows}"]
    (plain,) = run_in(tmp_path / "plain", data, model, 1, settings, watch, steps=3)
    layout = [PIPELINE, CHUNKS]
    for seen in run_in(tmp_path / "staged", data, model, 2, [*settings, *layout], watch, steps=3):
        assert seen.evaluation.weight == plain.evaluation.weight
        assert seen.evaluation.loss == pytest.approx(plain.evaluation.loss, rel=1e-5)
        assert seen.evaluation.parts == pytest.approx(plain.evaluation.parts, rel=1e-5)
        np.testing.assert_allclose(seen.logits, plain.logits, atol=1e-4, rtol=1e-4)


def greatest_bounded(run: Run) -> tuple[float, list[float]]:
    """The greatest bounded master that this rank owns after training, and the gradient norms."""
    norms = watch(run).gradient_norms
    owned = [f for f in run.engine.fragments() if f.name.endswith((".recurrent", ".peephole"))]
    return max((float(f.tensors["master"].abs().max()) for f in owned), default=0.0), norms


def test_weights_at_the_bound_stay_there(tmp_path: Path, data: Datasets) -> None:
    bound = ["model.recurrent_clip=0.1", "optim.lr=2e-2", MICRO]
    ((greatest, norms),) = run_in(tmp_path / "plain", data, "lstm", 1, bound, greatest_bounded)
    ended = run_in(tmp_path / "shards", data, "lstm", 4, [*bound, PIPELINE, SHARDED], greatest_bounded)
    assert max(found for found, _ in ended) == greatest == pytest.approx(0.1, abs=1e-8)
    assert ended[0][1] == pytest.approx(norms, rel=1e-4)


def refusal(run: Run) -> tuple[str, bool]:
    """What Newton's alarm says, and whether the weights are as they were."""
    before = [f.tensors["master"].clone() for f in run.engine.fragments()]
    with pytest.raises(UserError) as caught:
        train(run)
    after = run.engine.fragments()
    return str(caught.value), all(
        torch.equal(one, f.tensors["master"]) for one, f in zip(before, after, strict=True)
    )


def test_all_stages_hear_newtons_alarm_of_one(tmp_path: Path, data: Datasets) -> None:
    strict = ["model.newton.on_exceed=error", "model.newton.limit=1e-12", "model.newton.iterations=3"]
    said = run_in(tmp_path, data, "gru", 2, [MICRO, PIPELINE, "model.newton.method=newton", *strict], refusal)
    assert len({message for message, _ in said}) == 1
    assert said[0][0].startswith("blocks.0.mixer.cell, step 1")
    assert all(unchanged for _, unchanged in said)


def newton_names(run: Run) -> Any:
    train(run)
    hook: Any = next(hook for hook in run.hooks._hooks if hook.name == "newton")
    return hook._names


def test_every_layer_is_in_newtons_figures(tmp_path: Path, data: Datasets) -> None:
    names = [f"blocks.{block}.mixer.cell" for block in range(4)]
    said = run_in(tmp_path, data, "gru", 2, [MICRO, PIPELINE, CHUNKS], newton_names, steps=3)
    assert said == [names, names]


def test_rows_that_make_no_multiple_of_micro_batches_are_refused(tmp_path: Path, data: Datasets) -> None:
    layout = [PIPELINE, CHUNKS, "data.global_batch_rows=6"]
    with pytest.raises(
        RanksFailed, match="3 rows per data-parallel rank make no multiple of 2 micro-batches"
    ):
        run_in(tmp_path, data, "sigmoid", 4, layout, train)
