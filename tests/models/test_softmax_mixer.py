"""Softmax attention: every way it is computed gives what the masked form gives.

Shape suffixes: B batch, T time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from models.layers.attention import AttentionShape
from models.softmax.mixer import SoftmaxAttention, document_bounds, flex, has_flash, takes_flash


def layer(positions: Literal["alibi", "rope"], causal: bool = True) -> SoftmaxAttention:
    shape = AttentionShape(
        width=64,
        heads=4,
        kv_heads=2,
        positions=positions,
        rope_base=1e4,
        qk_norm=False,
        norm_epsilon=1e-5,
        causal=causal,
    )
    return SoftmaxAttention(shape)


def inputs(time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, time, heads, 16, generator=generator) for heads in (4, 2, 2))
    ids = (torch.rand(2, time, generator=generator) < 0.05).long().cumsum(1)
    return q, k, v, ids


@pytest.mark.parametrize("positions", ["alibi", "rope"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_gives_what_the_mask_gives(
    positions: Literal["alibi", "rope"], packed: bool, causal: bool
) -> None:
    q, k, v, ids = inputs(150)
    attention = layer(positions, causal)
    masked = attention.attend(q, k, v, ids if packed else None, attention.slopes(q))
    functions = (flex_attention, create_block_mask)
    ours = flex(q, k, v, ids if packed else None, attention.slopes(q), functions, causal=causal)
    torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    q, k, v, _ = inputs(40)
    ids = (torch.arange(40) >= 25).long().expand(2, -1)
    attention = layer("alibi")
    packed = attention.attend(q, k, v, ids, attention.slopes(q))
    alone = attention.attend(q[:, 25:], k[:, 25:], v[:, 25:], None, attention.slopes(q))
    torch.testing.assert_close(packed[:, 25:], alone)


def test_documents_of_a_batch_as_bounds_of_its_flat_form() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    bounds = document_bounds(ids)
    assert bounds["cu_seqlens_q"].tolist() == [
        0,
        2,
        5,
        6,
        7,
        10,
    ]  # a row's end is a document's, same id or not
    assert bounds["cu_seqlens_q"].dtype == torch.int32
    assert bounds["cu_seqlens_k"] is bounds["cu_seqlens_q"]
    assert bounds["max_seqlen_q"] == bounds["max_seqlen_k"] == 5


def test_flash_attn_is_for_half_precision_on_a_gpu() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert not takes_flash(torch.zeros(1, 1, 1, 16))
    with FakeTensorMode():
        assert not takes_flash(torch.zeros(1, 1, 1, 16, device="cuda"))
        assert takes_flash(torch.zeros(1, 1, 1, 16, device="cuda", dtype=torch.bfloat16)) == has_flash()
