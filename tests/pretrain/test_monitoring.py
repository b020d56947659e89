"""Every scalar has its help text, in the docs too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.monitoring import SCALARS, TensorBoardSink, help_text, layer_scalar


def test_docs_list_every_scalar_with_its_help() -> None:
    rows = re.findall(
        r"^\| `([a-z_/]+/[a-z_]+)` \| (.+) \|$", Path("pretrain/README.md").read_text(), flags=re.M
    )
    assert dict(rows) == dict(SCALARS)


def test_a_layers_series_has_the_help_of_the_whole() -> None:
    name = layer_scalar("newton/residual_max", 3)
    assert name == "newton/residual_max/layer_03"
    assert help_text(name) == SCALARS["newton/residual_max"]
    with pytest.raises(AssertionError, match="no help text"):
        help_text(layer_scalar("newton/secret", 3))


def test_a_scalar_without_help_is_a_bug(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    with pytest.raises(AssertionError, match="no help text"):
        sink.write(1, {"loss/secret": 1.0})
    sink.close()
