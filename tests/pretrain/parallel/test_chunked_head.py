"""Ranks that predict unequally many tokens make their logits in equally many chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.layers import loss
from tests.pretrain.parallel.runs import Datasets, train_in


def test_zero_3_with_chunks_of_logits(
    tmp_path: Path, data: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the head gathers its weight from all ranks: one call more on a rank, and all would wait."""
    expected = train_in(tmp_path / "whole", data, "trimodal", 1, [], steps=3)
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 2**11)
    found = train_in(tmp_path / "chunks", data, "trimodal", 2, ["parallel.zero=3"], steps=3)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
