"""The gradient norm is right to five digits at any size."""

from __future__ import annotations

import pytest
import torch

from pretrain.engine.clip import RUN_ELEMENTS, joint_norm


@pytest.mark.parametrize("sizes", [(1,), (3, 5), (RUN_ELEMENTS, RUN_ELEMENTS + 1), (4_000_001, 7)])
def test_the_joint_norm_is_that_in_double_precision(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    gradients = [torch.randn(size) * torch.rand(size) ** 8 for size in sizes]
    exact = torch.cat([one.double() for one in gradients]).norm().item()
    assert joint_norm(gradients).item() == pytest.approx(exact, rel=1e-6)


def test_of_no_gradient_it_is_zero_and_of_a_transposed_one_right() -> None:
    assert joint_norm([]).item() == 0.0
    gradient = torch.randn(300, 200).T
    assert joint_norm([gradient]).item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    gradient = torch.zeros(3 * RUN_ELEMENTS)
    gradient[-5] = torch.nan
    assert joint_norm([gradient]).isnan()
