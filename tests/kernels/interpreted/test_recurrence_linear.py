"""The scan kernels in Triton's interpreter: bit for bit for integers, around every border of a tile."""

from __future__ import annotations

import pytest
import torch

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference, op
from kernels.linear_recurrence.op import Tile
from tests.kernels.recurrence_problems import assert_bit_equal, integers, rotations

WINDOW = 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's scan is a loop over elements. Three channels do not fill a tile of two."""
    monkeypatch.setattr(op, "TILES", {False: Tile(WINDOW, 2, 4), True: Tile(WINDOW, 2, 4)})


@pytest.mark.parametrize("block", [False, True], ids=["diagonal", "block"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bit_equal_around_every_border_of_a_tile(block: bool, reverse: bool) -> None:
    for border in range(WINDOW, 4 * WINDOW, WINDOW):
        for time in (border - 1, border, border + 1):
            assert_bit_equal(time, block=block, reverse=reverse)
    assert_bit_equal(1, block=block, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_rotations(reverse: bool) -> None:
    a, b, state = rotations(30)
    expected = linear_recurrence_reference(a, b, state, reverse=reverse)
    torch.testing.assert_close(
        linear_recurrence(a, b, state, reverse=reverse), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("block", [False, True], ids=["diagonal", "block"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients(block: bool, reverse: bool) -> None:
    tensors = [x.requires_grad_() for x in integers(9, block=block)]
    cotangent = torch.randn(tensors[1].shape, generator=torch.Generator().manual_seed(0))
    ours, right = (
        torch.autograd.grad(function(*tensors, reverse=reverse), tensors, cotangent)
        for function in (linear_recurrence, linear_recurrence_reference)
    )
    for actual, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16() -> None:
    a, b, state = (x.bfloat16() for x in rotations(20))
    expected = linear_recurrence_reference(a.double(), b.double(), state.double())
    y = linear_recurrence(a, b, state)
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < 0.005
