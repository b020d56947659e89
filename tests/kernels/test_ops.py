"""Operators of one's own: what `torch.library.custom_op` gives too, its own judge, and what an operator is without a
gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import Operator, operator


@operator("triptych_test::scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


@scaled.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


@operator("triptych_test::halved")
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


scaled.register_autograd(lambda ctx, grad: (halved(grad) * 2 * ctx.factor, None), setup_context=_keep)


def test_values_gradients_and_a_whole_graph() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.triptych_test.scaled.default, (x, 3.0))
    assert torch.equal(scaled(x, 3.0), 3 * x)
    assert torch.autograd.gradcheck(lambda y: scaled(y, 3.0), x)
    compiled = torch.compile(lambda y: scaled(y, 3.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 3 * x)
    assert isinstance(scaled, Operator)


def test_without_a_formula_a_gradient_is_an_error() -> None:
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(halved(x), x / 2)
    with pytest.raises(RuntimeError, match="triptych_test::halved has no gradient"):
        halved(x).sum().backward()
    (first,) = torch.autograd.grad(scaled(x, 3.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="triptych_test::halved has no gradient"):
        first.sum().backward()
