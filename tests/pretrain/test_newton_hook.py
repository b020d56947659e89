"""Which figures stop a run, and with which words; and the scalars they become."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest

from kernels.newton_rnn import Report, Solver
from models.pararnn.config import ParaRNNConfig
from models.pararnn.telemetry import FIGURES
from pretrain.errors import UserError
from pretrain.hooks.newton import as_record, refuse

CELLS = ["blocks.0.mixer.cell", "blocks.1.mixer.cell"]


@dataclass
class Layer:
    residual_max: float = 1e-6
    others: dict[str, float] = field(default_factory=dict)

    def figures(self) -> list[float]:
        known = {"residual_max": self.residual_max, "iterations": 3.0, **self.others}
        return [known.get(name, 0.0) for name in FIGURES]


@pytest.mark.parametrize("policy", ["iterate", "sequential", "error"])
@pytest.mark.parametrize("residual", [math.nan, math.inf])
def test_a_residual_that_is_not_finite_stops_under_every_policy(
    policy: Literal["iterate", "sequential", "error"], residual: float
) -> None:
    figures = [Layer().figures(), Layer(residual).figures()]
    with pytest.raises(UserError, match="blocks.1.mixer.cell, step 7: .* not finite; consequence"):
        refuse(CELLS, figures, Solver(on_exceed=policy), 7, "consequence")


def test_a_residual_above_the_limit_stops_under_error_alone() -> None:
    figures = [Layer(0.5).figures(), Layer(0.9).figures()]
    for policy in ("iterate", "sequential"):
        refuse(CELLS, figures, Solver(on_exceed=policy), 7, "consequence")
    with pytest.raises(UserError, match="blocks.0.mixer.cell, step 7: .* 3 Newton .* 0.5, above .* 0.01"):
        refuse(CELLS, figures, Solver(on_exceed="error"), 7, "consequence")
    refuse(CELLS, [Layer().figures()] * 2, Solver(on_exceed="error"), 7, "consequence")


def test_every_layer_has_its_series_and_the_worst_the_plain_name() -> None:
    record = as_record([Layer(0.25).figures(), Layer(0.5, {"acted": 0.75}).figures()])
    assert record["newton/residual_max"] == record["newton/residual_max/layer_01"] == 0.5
    assert record["newton/residual_max/layer_00"] == 0.25
    assert record["newton/acted"] == 0.75 and len(record) == 3 * len(FIGURES)


def test_what_a_report_holds_is_what_the_cells_note() -> None:
    """The kernels' report and the telemetry must not drift apart."""
    assert {"clip_saturation", *Report.__dataclass_fields__} - {"solver"} == set(FIGURES)
    assert ParaRNNConfig.changeable == ("newton", "recurrent_clip")
