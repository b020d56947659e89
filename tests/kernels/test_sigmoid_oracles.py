"""Sigmoid attention against two judges from outside: FlexAttention, and the grid of FlashSigmoid's authors.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import logsigmoid

from kernels.sigmoid_attention import sigmoid_attention
from tests.kernels.sigmoid_cases import (
    GRID_LENGTHS,
    GRID_WIDTHS,
    Case,
    grid,
    grid_errors,
    inputs,
    options,
    segment_ids,
)

FLEX_CASES = {
    "causal": Case(batch=2, queries=128, keys=128, heads=2, key_heads=2, width=16),
    "packed, with ALiBi": Case(
        batch=2, queries=128, keys=128, heads=2, key_heads=2, width=16, segments=True, alibi="constant"
    ),
    "grouped, windowed": Case(batch=1, queries=128, keys=128, heads=4, key_heads=2, width=16, window=40),
}


def by_flex_attention(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """Softmax over log sigmoid(s) has the sum of the weights as its normaliser: multiplied back, it is gone.

    Source: the sigmoid recipe of github.com/meta-pytorch/attention-gym.
    """
    chosen = options(case, dtype=torch.float32)
    slopes = chosen["alibi_slopes"]
    ids = segment_ids(case.batch, case.queries, 0)

    window = case.window
    assert window is None or isinstance(window, int)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        penalty = 0.0 if slopes is None else slopes[h] * (i - j).abs()
        return logsigmoid(s - penalty + chosen["bias"])

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        if window is not None:
            seen = seen & (j >= i - window)
        if case.segments:
            seen = seen & (ids[b, i] == ids[b, j])
        return seen

    mask = create_block_mask(visible, case.batch, None, case.queries, case.keys, device="cpu")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = case.heads != case.key_heads
    out, aux = flex_attention(
        q, k, v, score_mod=score, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return (out * aux.lse.exp()[..., None]).transpose(1, 2)


@pytest.mark.parametrize("case", FLEX_CASES.values(), ids=FLEX_CASES.keys())
def test_flex_attention_agrees(case: Case) -> None:
    """Its forward pass; it has no backward on a CPU."""
    q, k, v = (x.detach() for x in inputs(case, dtype=torch.float32))
    right = by_flex_attention(q, k, v, case)
    ours = sigmoid_attention(q, k, v, **options(case, dtype=torch.float32))
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_the_grid_has_all_its_cases() -> None:
    assert sum(1 for _ in grid(GRID_WIDTHS, GRID_LENGTHS)) == 42_240


def test_a_sample_of_the_grid() -> None:
    """Every 2,003rd case of those with rows up to 512."""
    sample = list(islice(grid(GRID_WIDTHS, GRID_LENGTHS[:6]), 0, None, 2003))
    assert len(sample) == 13
    for case in sample:
        assert max(grid_errors(sigmoid_attention, case, batch=1)) < 2, case


@pytest.mark.grid
@pytest.mark.timeout(0)
@pytest.mark.parametrize("lengths", GRID_LENGTHS, ids=str)
@pytest.mark.parametrize("width", GRID_WIDTHS)
def test_the_whole_grid(width: int, lengths: tuple[int, int]) -> None:
    """On a GPU at the authors' batch of 4 (through the kernels, if Triton is installed). On a CPU at batch 1, for
    a day even so; rows are independent of each other."""
    device, batch = ("cuda", 4) if torch.cuda.is_available() else ("cpu", 1)
    for case in grid((width,), (lengths,)):
        assert max(grid_errors(sigmoid_attention, case, batch=batch, device=device)) < 2, case
