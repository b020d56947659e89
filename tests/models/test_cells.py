"""Cells: the bound, a cell of one's own, and what they note of their solutions."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.newton_rnn import Solver
from models import families
from models.initialise import initialise
from models.layers.loss import token_cross_entropy
from models.pararnn.bound import bounded, saturation
from models.pararnn.cells import CELLS, CellShape, Elman, ParaGRU, StepCell
from models.pararnn.config import CELLS as settings_cells
from models.pararnn.projection import project_heads
from models.pararnn.telemetry import FIGURES


def shape(solver: Solver | None = None, clip: float | None = None, width: int = 12) -> CellShape:
    return CellShape(width=width, heads=3, clip=clip, solver=solver or Solver())


def drawn(cell: torch.nn.Module, scale: float = 0.5) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=scale, generator=generator)
    return cell.double()


def test_the_bound_holds_in_the_forward_pass_and_lets_weights_come_back() -> None:
    weight = torch.tensor([0.2, 0.5, 0.5, 0.9, 0.9, -0.9, -0.9], requires_grad=True)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    out = bounded(weight, 0.5)
    assert out.tolist() == [*weight[:1].tolist(), 0.5, 0.5, 0.5, 0.5, -0.5, -0.5]
    out.backward(grad)
    assert weight.grad is not None
    # Descent moves against the gradient: what is beyond and would go further out stands still. At the bound
    # the gradient is whole, so that those of micro-batches add up.
    assert weight.grad.tolist() == [1.0, -1.0, 1.0, 0.0, 1.0, 0.0, -1.0]
    assert bounded(weight, None) is weight
    assert float(saturation([weight, torch.zeros(1)], 0.5)) == 6 / 8
    assert float(saturation([weight], None)) == 0


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.5, 0.9])
def test_a_weight_at_the_bound_in_bf16(limit: float) -> None:
    """The bound is rounded as the weight is, up or down."""
    weight = torch.tensor([limit, -limit]).bfloat16().requires_grad_()
    bounded(weight, limit).backward(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16))
    assert weight.grad is not None and weight.grad.tolist() == [-1.0, 1.0]
    assert float(saturation([weight], limit)) == 1


def test_first_weights_are_within_the_bound_and_the_model_names_what_is_bounded() -> None:
    family = families["pararnn"]
    config = family.config(cell="lstm", layers=2, width=12, heads=3, vocabulary=8, recurrent_clip=0.2)
    model: Any = family.build(config)
    initialise(model, 0)
    parameters = dict(model.named_parameters())
    cells = [f"blocks.{layer}.mixer.cell" for layer in range(2)]
    assert model.bounds() == {f"{c}.{n}": 0.2 for c in cells for n in ("recurrent", "peephole")}
    for name, bound in model.bounds().items():
        assert parameters[name].abs().max().item() == pytest.approx(bound)
    unbounded: Any = family.build(replace(config, recurrent_clip=None))
    assert unbounded.bounds() == {}


def test_weights_pushed_out_stay_at_the_bound_and_return() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.4, -0.4]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    seen = []
    for step in range(20):
        direction = -1.0 if step < 10 else 1.0
        optimizer.zero_grad()
        (bounded(weight, 0.5) * torch.tensor([direction, -direction])).sum().backward()
        optimizer.step()
        seen.append(bounded(weight.detach(), 0.5).tolist())
    assert all(abs(x) <= 0.5 for pair in seen for x in pair)
    assert seen[9] == pytest.approx([0.5, -0.5]) and abs(seen[-1][0]) < 0.5


@pytest.mark.parametrize("name", CELLS)
def test_newton_and_time_order_agree_and_resets_cut(name: str) -> None:
    ids = torch.tensor([[0] * 5 + [1] * 8, [0] * 11 + [3] * 2])
    x = torch.randn(2, 13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for solver in (Solver(method="sequential"), Solver(method="newton", iterations=6)):
        cell = drawn(CELLS[name](shape(solver)))
        out, final = cell(x, ids)
        grads = torch.autograd.grad(out.square().sum() + final.sum(), list(cell.parameters()))
        results.append((out, final, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    cell = drawn(CELLS[name](shape(Solver(method="sequential"))))
    parts = torch.cat([cell(x[:1, :5])[0], cell(x[:1, 5:])[0]], dim=1)
    torch.testing.assert_close(results[0][0][:1], parts)


@pytest.mark.parametrize("name", CELLS)
def test_steps_equal_the_sequence(name: str) -> None:
    cell: Any = drawn(CELLS[name](shape(Solver(method="sequential"), clip=0.3)))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    whole, final = cell(x)
    state = cell.new_state(2, None, torch.float64)
    outputs = []
    for t in range(7):
        out, state = cell(x[:, t : t + 1], None, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state.to(final.dtype), final)


def test_a_rank_with_some_of_the_heads_runs_the_same_code() -> None:
    """What tensor parallelism relies on: channels of one head never meet those of another."""
    cell: Any = drawn(ParaGRU(shape()))
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    whole, _ = cell(x)
    parts = []
    for head in range(3):
        part: Any = ParaGRU(shape(width=12)).double()
        channels = slice(4 * head, 4 * head + 4)
        part.input.data = cell.input.data[head : head + 1]
        part.recurrent.data, part.bias.data = cell.recurrent.data[:, channels], cell.bias.data[:, channels]
        parts.append(part(x[..., channels])[0])
    torch.testing.assert_close(torch.cat(parts, -1), whole)


class Mixing(StepCell):
    gates = 1

    @staticmethod
    def next_state(inputs_GD: Tensor, weights: tuple[Tensor, ...], state_D: Tensor) -> Tensor:
        return torch.tanh(weights[0][0] * state_D.roll(1, -1) + inputs_GD[..., 0, :])


def test_a_step_that_mixes_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="mixes channels"):
        Mixing(shape())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_projection_by_heads(dtype: torch.dtype) -> None:
    """Against einsum, gradients too, where the gradient's memory is in another order as well."""
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 7, 6, dtype=dtype).transpose(0, 1)
    out, expected = project_heads(x, weight), torch.einsum("mhi,hio->mho", x, weight)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y, (x, weight), grad) for y in (out, expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_the_cell_in_the_docs_is_the_one_here() -> None:
    text = Path("models/pararnn/README.md").read_text(encoding="utf-8").split("## A cell of one's own")[1]
    lines = text.split("\n## ")[0].splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    cells = dict(CELLS)
    exec(code, {"torch": torch, "StepCell": StepCell, "CELLS": cells})
    assert cells["elman"] is not Elman
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    ours, theirs = (drawn(kind(shape()))(x)[0] for kind in (Elman, cells["elman"]))
    torch.testing.assert_close(ours, theirs)


def test_elman_learns() -> None:
    """The example cell, in a model, on the sum of a sequence's signs so far."""
    family = families["pararnn"]
    settings = {
        "cell": "elman",
        "layers": 1,
        "width": 16,
        "heads": 2,
        "mlp_width": 0,
        "initialisation": "torch",
    }
    model: Any = family.build(family.config(**settings).resolved(vocabulary=3, sequence_length=12))
    initialise(model, 0)
    assert isinstance(model.cells()["blocks.0.mixer.cell"], Elman)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(40):
        tokens = torch.randint(2, (32, 12), generator=generator)
        targets = (tokens.cumsum(1) * 2 > torch.arange(1, 13)).long()
        loss, _ = token_cross_entropy(
            model.head, model(tokens), targets, torch.ones_like(tokens), chunk_tokens=10**6
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / tokens.numel())
    assert losses[-1] < 0.35 < 0.65 < losses[0]


def test_telemetry_is_of_training_alone_and_begins_anew() -> None:
    cell: Any = drawn(ParaGRU(shape(Solver(method="newton"), clip=0.2)))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cell(x)
    cell(3 * x)
    figures = dict(zip(FIGURES, cell.telemetry.take().tolist(), strict=True))
    assert figures["iterations"] >= 3 and 0 < figures["residual_mean"] <= figures["residual_max"] < 1e-2
    assert 0 < figures["clip_saturation"] < 1 and 0 < figures["jacobian_norm"] < 1.1
    assert cell.telemetry.take().tolist() == [0.0] * len(FIGURES)
    cell.eval()(x)
    assert cell.telemetry.take().tolist() == [0.0] * len(FIGURES)


def test_the_settings_know_the_cells_and_their_gates() -> None:
    assert {name: cell.gates for name, cell in CELLS.items()} == settings_cells
