"""The engine holds the model that the config describes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.assembly import build_engine
from pretrain.config import load_config
from pretrain.parallel.mesh import build_mesh
from pretrain.plan.parameters import count_parameters, resolved
from tests.e2e.training import write_config
from tests.harness import run_ranks


def _elements(config_path: Path, overrides: list[str]) -> tuple[int, bool]:
    config = load_config(config_path, overrides)
    length = config.data.sequence_length
    config = config.replace(
        model=config.model.resolved(vocabulary=config.model.vocabulary, sequence_length=length)
    )
    engine = build_engine(config, build_mesh(config.parallel), torch.device("cpu"))
    owned = sum(fragment.length for fragment in engine.fragments())
    with engine.inference() as model:
        tied = model.head.weight is model.embedding.weight  # type: ignore[union-attr]
    return owned, tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_ranks_together_own_what_plan_counts(tmp_path: Path, zero: int, tied: bool) -> None:
    overrides = ["model.vocabulary=300", f"model.tied_head={str(tied).lower()}", f"parallel.zero={zero}"]
    path = write_config(tmp_path, tmp_path)
    planned = sum(count_parameters(resolved(load_config(path, overrides))).values())
    owned = run_ranks(2, _elements, path, overrides)
    assert [is_tied for _, is_tied in owned] == [tied, tied]
    assert sum(count for count, _ in owned) == planned * (2 if zero == 0 else 1)
