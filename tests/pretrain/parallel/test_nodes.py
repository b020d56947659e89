"""ZeRO 3 with a copy of the parameters on each node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.assembly import build_engine
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.parallel.mesh import build_mesh
from pretrain.parallel.nodes import node_name, replicas_by_node
from pretrain.run_data import open_run_data
from tests.e2e.training import Trained, train_rank
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import Datasets, References, agree, read_curve, write_run

NODE = ["parallel.zero=3", "parallel.zero_group=node"]


def _on_nodes(config: Path, settings: list[str], of_node: int, stop_at: int | None = None) -> Trained:
    os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // of_node}"
    return train_rank(config, settings, stop_at)


@pytest.mark.parametrize(
    ("of_node", "settings"),
    [
        (4, ["parallel.tensor=2", "parallel.sequence=true"]),
        pytest.param(2, [], marks=pytest.mark.slow),
    ],
)
def test_training_and_a_resume_are_those_of_one_process(
    tmp_path: Path, data: Datasets, alone: References, of_node: int, settings: list[str]
) -> None:
    """The resumed run is evaluated first: its copies must be of the weights that were loaded."""
    config = write_run(tmp_path, data, "gru", 6)
    norms: list[float] = []
    evaluated = "monitor.evaluate_every_steps=2"
    for stop_at in (3, None):
        more = [*NODE, *settings, evaluated]
        norms += run_ranks(4, _on_nodes, config, more, of_node, stop_at)[0].gradient_norms
    agree(read_curve(tmp_path, norms), alone("gru", [evaluated]))


def _sharers(config_path: Path) -> list[int]:
    os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // 2}"
    config = open_run_data(load_config(config_path, NODE)).config
    engine = build_engine(config, build_mesh(config.parallel), torch.device("cpu"))
    with engine.inference() as model:
        model(torch.zeros(1, 4, dtype=torch.long))
        first: Any = next(model.blocks.parameters())  # type: ignore[union-attr]
        group = first.ds_zero_param_process_group
        assert first.ds_secondary_tensor.numel() * 2 >= first.ds_numel > first.ds_tensor.numel() * 2
    return torch.distributed.get_process_group_ranks(group)


def test_each_node_has_a_copy(tmp_path: Path, data: Datasets) -> None:
    found = run_ranks(4, _sharers, write_run(tmp_path, data, "sigmoid", 3))
    assert found == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_which_ranks_share() -> None:
    tensor_pairs = [("a", (0, 2, 4, 6)), ("a", (1, 3, 5, 7))] * 2 + [
        ("b", (0, 2, 4, 6)),
        ("b", (1, 3, 5, 7)),
    ] * 2
    assert replicas_by_node(tensor_pairs) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(UserError, match="some nodes hold 1 replicas of the model and some 2"):
        replicas_by_node([("a", (0, 1, 2)), ("a", (0, 1, 2)), ("b", (0, 1, 2))])
    with pytest.raises(UserError, match="each node holds one replica"):
        replicas_by_node([("a", (0, 1)), ("b", (0, 1))])
    assert node_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert node_name({})
