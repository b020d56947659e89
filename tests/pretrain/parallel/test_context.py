"""Ranks that share rows train as one process does, whatever the model's options."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.parallel.runs import Datasets, References, agree, read_curve, train_in
from tests.pretrain.parallel.table import CONTEXT

SUMMARIES = "parallel.recurrence=summaries"
NEWTON = ["model.newton.method=newton", "model.newton.iterations=6"]
ALIBI, ROPE = "model.positions=alibi", "model.positions=rope"
ELMAN = ["model.cell=elman", "model.block=mixer", "model.mlp_width=0"]


@pytest.mark.parametrize(
    ("model", "layout", "settings"),
    [
        ("trimodal", [CONTEXT], ["model.attention=sigmoid"]),
        pytest.param(
            "mamba2", [CONTEXT, "parallel.activation_checkpointing=full"], [], marks=pytest.mark.slow
        ),
        pytest.param("sigmoid", [CONTEXT], [ALIBI], marks=pytest.mark.slow),
        pytest.param("sigmoid", [CONTEXT], [ROPE], marks=pytest.mark.slow),
        pytest.param("softmax", [CONTEXT], [ALIBI], marks=pytest.mark.slow),
        pytest.param("softmax", [CONTEXT], ["model.heads=8", "model.kv_heads=4"], marks=pytest.mark.slow),
        pytest.param("gru", [CONTEXT], ELMAN, marks=pytest.mark.slow),
        pytest.param("gru", [CONTEXT, SUMMARIES], [*ELMAN, *NEWTON], marks=pytest.mark.slow),
        pytest.param("trimodal", [CONTEXT], ["model.attention=softmax"], marks=pytest.mark.slow),
        pytest.param("trimodal", [CONTEXT], ["model.image_positions=1d"], marks=pytest.mark.slow),
        pytest.param("trimodal", ["parallel.context=4"], ["model.attention=sigmoid"], marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_is_that_of_one_process(
    tmp_path: Path, data: Datasets, alone: References, model: str, layout: list[str], settings: list[str]
) -> None:
    ranks = 4 if "parallel.context=4" in layout else 2
    agree(train_in(tmp_path, data, model, ranks, [*layout, *settings]), alone(model, settings))


def test_a_checkpoint_moves_between_shared_and_whole_rows(
    tmp_path: Path, data: Datasets, alone: References
) -> None:
    """Two ranks of one row, one process, two ranks again: one unbroken curve."""
    norms = []
    for ranks, stop_at in ((2, 1), (1, 3), (2, None)):
        settings = [f"parallel.context={ranks}", "parallel.zero=2"]
        norms += train_in(tmp_path, data, "sigmoid", ranks, settings, 6, stop_at).gradient_norms
    agree(read_curve(tmp_path, norms), alone("sigmoid"))
