"""A mixer from outside of the tree (`examples/gated_linear_attention`), in layouts that share it in every way; and one
that does not say how it may be shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.errors import ConfigError
from tests.pretrain.parallel import runs
from tests.pretrain.parallel.runs import Datasets, train_in
from tests.pretrain.parallel.table import LAYERS, LAYOUTS

NAME = "gated_linear_attention:GatedLinear"
MODEL = (
    f'family: hybrid, mixers: ["{NAME}", sigmoid], mlp_width: 64, own: {{"{NAME}": {{heads: 4, key_width: 8}}}}, '
    "sigmoid: {heads: 4}"
)
SILENT = """
from typing import ClassVar
from torch import nn
from models.hybrid.mixers import MixerSettings

class Silent(MixerSettings):
    mixer: ClassVar[str] = "silent:Module"

    def products(self, shape, sequence_length):
        return 0.0

class Module(nn.Module):
    def __init__(self, settings, shape):
        super().__init__()
"""


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path("examples/gated_linear_attention").resolve()))
    monkeypatch.setenv("TRIPTYCH_MODULES", "gated_linear_attention, silent")
    monkeypatch.setitem(runs.MODELS, "own", MODEL)


def test_every_layout_trains_it_as_one_process_does(tmp_path: Path, data: Datasets) -> None:
    """Its heads' norms make Adam's first updates sensitive to rounding: gradient norms are compared in the first step,
    losses in all."""
    alone = train_in(tmp_path / "alone", data, "own", 1, [LAYERS], 3)
    for name in ("dp2 ZeRO 3", "tp2 sp cp2", "cp2 pp2"):
        layout = LAYOUTS[name]
        curve = train_in(tmp_path / name, data, "own", layout.ranks, [LAYERS, *layout.settings], 3)
        assert curve.losses == pytest.approx(alone.losses, rel=1e-5), name
        assert curve.gradient_norms[0] == pytest.approx(alone.gradient_norms[0], rel=1e-5), name


def test_one_that_says_nothing_is_refused_in_the_report_of_the_config(
    tmp_path: Path, data: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(runs.MODELS, "silent", 'family: hybrid, mixers: ["silent:Silent"]')
    config = runs.write_run(tmp_path, data, "silent", 3)
    load_config(config)
    with pytest.raises(ConfigError) as caught:
        load_config(config, ["parallel.tensor=2", "parallel.context=2"])
    told = str(caught.value)
    assert "parallel.tensor = 2: silent:Silent: Silent does not say how it is divided" in told
    assert (
        "parallel.context = 2" in told and "Silent does not say how its positions meet across ranks" in told
    )
    assert "the nearest layout that fits: parallel.tensor=1 parallel.context=1" in told
