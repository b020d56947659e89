"""Softmax attention as a layer. Shape suffixes: B batch, T time, S key time, H, K heads, D head width."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from models.declared import Crossing
from models.layers.attention import Attention

FLEX_SMALLEST_WIDTH = 16
FLASH_LARGEST_WIDTH = 256


class SoftmaxAttention(Attention):
    """`softmax(q k^T / sqrt(D) - slope |i - j|) v` between the projections.

    On a GPU: the `flash-attn` package where it is installed and the dtype is half precision; else torch's own
    attention, and FlexAttention (compiled on first use) for packed documents and ALiBi, which keeps no (T, S)
    mask. With `flash-attn` and packed documents the host waits once per layer, to learn how many there are.
    On a CPU: torch's own attention, with a mask where one is needed.
    """

    crossing = Crossing("attend", ("swap",), axes=("BTH", "BTH", "BTH", "", "H"))

    def attend(
        self,
        q_BTHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        segment_ids_BT: Tensor | None,
        slopes_H: Tensor | None,
    ) -> Tensor:
        """Softmax attention of the last T of S positions, (B, T, H, D)."""
        causal = self.shape.causal
        if takes_flash(q_BTHD):
            return flash(q_BTHD, k_BSKD, v_BSKD, segment_ids_BT, slopes_H, causal=causal)
        square = q_BTHD.shape[1] == k_BSKD.shape[1]
        plain = segment_ids_BT is None and slopes_H is None
        wide = q_BTHD.shape[3] >= FLEX_SMALLEST_WIDTH
        if q_BTHD.device.type == "cuda" and square and wide and not plain:
            functions = compiled_flex()
            return flex(q_BTHD, k_BSKD, v_BSKD, segment_ids_BT, slopes_H, functions, causal=causal)
        one_query = q_BTHD.shape[1] == 1  # the last of all positions sees every key
        unmasked = plain and (square or one_query or not causal)
        mask = None if unmasked else self._mask(q_BTHD, k_BSKD, segment_ids_BT, slopes_H)
        out_BHTD = scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and mask is None and square,
            enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
        )
        return out_BHTD.transpose(1, 2)

    def _mask(
        self, q_BTHD: Tensor, k_BSKD: Tensor, segment_ids_BT: Tensor | None, slopes_H: Tensor | None
    ) -> Tensor:
        """What joins the scores, (1 or B, 1 or H, T, S): whether a pair is visible, or ALiBi and -inf."""
        queries, keys = q_BTHD.shape[1], k_BSKD.shape[1]
        key_S = torch.arange(keys, device=q_BTHD.device)
        distance_TS = torch.arange(keys - queries, keys, device=q_BTHD.device)[:, None] - key_S
        visible = (distance_TS >= (0 if self.shape.causal else -keys))[None, None]
        if segment_ids_BT is not None:
            visible = visible & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
        if slopes_H is None:
            return visible
        penalty = -slopes_H[:, None, None] * distance_TS.abs()
        return penalty.masked_fill(~visible, float("-inf")).to(q_BTHD.dtype)


@cache
def has_flash() -> bool:
    """Whether the `flash-attn` package, of major version 2, is installed."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn_2_cuda") is not None


def takes_flash(q_BTHD: Tensor) -> bool:
    half = q_BTHD.dtype in (torch.float16, torch.bfloat16)
    return has_flash() and half and q_BTHD.device.type == "cuda" and q_BTHD.shape[3] <= FLASH_LARGEST_WIDTH


def flash(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    segment_ids_BT: Tensor | None,
    slopes_H: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """By `flash-attn`, whose ALiBi is -slope |i + S - T - j| and whose causality is aligned to the last key."""
    package = import_module(
        "flash_attn"
    )  # optional: no dependency of this project declares it for every machine
    options: dict[str, Any] = {"causal": causal, "alibi_slopes": slopes_H}
    if segment_ids_BT is None:
        out: Tensor = package.flash_attn_func(q_BTHD, k_BSKD, v_BSKD, **options)
        return out
    flat = [x.flatten(0, 1) for x in (q_BTHD, k_BSKD, v_BSKD)]
    out = package.flash_attn_varlen_func(*flat, **document_bounds(segment_ids_BT), **options)
    return out.view(q_BTHD.shape)


def document_bounds(segment_ids_BT: Tensor) -> dict[str, Any]:
    """Where the documents of a flattened batch begin and end, as `flash_attn_varlen_func` takes it.

    The longest document is not looked up: the row's length bounds it.
    """
    batch, time = segment_ids_BT.shape
    begins_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts = begins_BT.flatten().nonzero().flatten()  # the host waits for their number
    bounds = torch.cat((starts, starts.new_tensor([batch * time]))).int()
    return {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": time, "max_seqlen_k": time}


@cache
def compiled_flex() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """FlexAttention and its mask builder, compiled: uncompiled they would make the (T, S) matrices."""
    return torch.compile(flex_attention), torch.compile(create_block_mask)


def flex(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    segment_ids_BT: Tensor | None,
    slopes_H: Tensor | None,
    functions: tuple[Callable[..., Tensor], Callable[..., Any]],
    *,
    causal: bool,
) -> Tensor:
    """By FlexAttention, with blocks outside a document skipped. `functions`: attention and mask builder."""
    attention, block_mask = functions

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        before = j <= i if causal else j >= 0
        if segment_ids_BT is None:
            return before
        return before & (segment_ids_BT[b, i] == segment_ids_BT[b, j])

    def penalised(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert slopes_H is not None
        return score - slopes_H[h] * (i - j).abs()

    batch, time = q_BTHD.shape[:2]
    mask = block_mask(
        visible, None if segment_ids_BT is None else batch, None, time, time, device=q_BTHD.device
    )
    out_BHTD = attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        score_mod=None if slopes_H is None else penalised,
        block_mask=mask,
        enable_gqa=q_BTHD.shape[2] != k_BTKD.shape[2],
    )
    return out_BHTD.transpose(1, 2)
