"""Softmax attention as a layer. Shape suffixes: B batch, T time, S key time, H, K heads, D head width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.layers.attention import Attention


class SoftmaxAttention(Attention):
    """`softmax(q k^T / sqrt(D) - slope |i - j|) v` between the projections."""

    def attend(self, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        """Causal softmax attention of the last T of S positions, (B, T, H, D)."""
        plain = segment_ids_BT is None and self.shape.positions != "alibi"
        square = q_BTHD.shape[1] == k_BSKD.shape[1]
        one_query = q_BTHD.shape[1] == 1  # the last of all positions sees every key
        mask = None if plain and (square or one_query) else self._mask(q_BTHD, k_BSKD, segment_ids_BT)
        out_BHTD = scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and square,
            enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
        )
        return out_BHTD.transpose(1, 2)

    def _mask(self, q_BTHD: Tensor, k_BSKD: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
        """What joins the scores, (1 or B, 1 or H, T, S): whether a pair is visible, or ALiBi and -inf."""
        queries, keys = q_BTHD.shape[1], k_BSKD.shape[1]
        key_S = torch.arange(keys, device=q_BTHD.device)
        distance_TS = torch.arange(keys - queries, keys, device=q_BTHD.device)[:, None] - key_S
        visible = (distance_TS >= 0)[None, None]
        if segment_ids_BT is not None:
            visible = visible & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
        slopes_H = self.slopes(q_BTHD)
        if slopes_H is None:
            return visible
        penalty = -slopes_H[:, None, None] * distance_TS
        return penalty.masked_fill(~visible, float("-inf")).to(q_BTHD.dtype)
