"""The short convolution: against torch's own, document by document, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers.conv import CausalConv, last_inputs

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def some_conv(taps: int, channels: int = 3) -> CausalConv:
    conv = CausalConv(channels, taps).double()
    generator = torch.Generator().manual_seed(taps)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return conv


def by_torch(conv: CausalConv, x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x.transpose(1, 2), (conv.taps - 1, 0))
    weight = conv.weight[:, None]
    return torch.nn.functional.conv1d(padded, weight, conv.bias, groups=x.shape[2]).transpose(1, 2)


def segments(parts: list[int], batch: int = 2) -> torch.Tensor:
    """Ids that repeat: a document is known by where it begins, not by a number of its own."""
    return torch.cat([torch.full((batch, n), i % 2) for i, n in enumerate(parts)], dim=1)


@settings(deadline=None, max_examples=40)
@given(parts=lengths, taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_documents_are_apart_and_gradients_too(parts: list[int], taps: int, seed: int) -> None:
    conv = some_conv(taps)
    torch.manual_seed(seed)
    x = torch.randn(2, sum(parts), 3, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([by_torch(conv, part) for part in x.split(parts, 1)], dim=1)
    out = conv(x, segments(parts))
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    leaves = (x, *conv.parameters())
    right = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), leaves), right)


@settings(deadline=None, max_examples=40)
@given(parts=lengths, taps=st.integers(1, 5), more=st.integers(1, 4))
def test_reading_on_from_what_is_remembered(parts: list[int], taps: int, more: int) -> None:
    conv = some_conv(taps)
    x = torch.randn(2, sum(parts) + more, 3, dtype=torch.float64)
    ids = segments([*parts[:-1], parts[-1] + more])
    first = sum(parts)
    before = torch.zeros(2, taps - 1, 3, dtype=torch.float64)
    remembered = last_inputs(x[:, :first], ids[:, :first], before, taps - 1)
    assert remembered.shape == before.shape
    torch.testing.assert_close(conv(x[:, first:], None, remembered), conv(x, ids)[:, first:])


def test_bf16_sums_in_fp32() -> None:
    conv = some_conv(4)
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    exact = conv(x, None)
    rounded = conv.bfloat16()(x.bfloat16(), None)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() / exact.norm() < 0.006


@pytest.mark.parametrize("taps", [1, 4])
def test_gradcheck(taps: int) -> None:
    conv = some_conv(taps, 2)
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    before = torch.randn(1, taps - 1, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda x, before, *_: conv(x, ids, before), (x, before, *conv.parameters())
    )
