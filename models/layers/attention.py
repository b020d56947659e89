"""What sigmoid and softmax attention share: the projections, QK norm, positions and the cache.

Shape suffixes: B batch, T time, S key time, H query heads, K key heads, D head width, C model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.layers.cache import KVCache
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.positions import alibi_slopes, rotary_table, rotate
from models.sharding import Column, Part, Row, Shared, Split


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and options of one attention layer.

    causal: a position sees itself and those before it; else all of its document.
    """

    width: int
    heads: int
    kv_heads: int
    positions: Literal["alibi", "rope", "none"]
    rope_base: float
    qk_norm: bool
    norm_epsilon: float
    causal: bool = True

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def qkv_features(self) -> tuple[int, int, int]:
        """Rows of q, k and v in `qkv`, in this order."""
        keys = self.kv_heads * self.head_width
        return self.heads * self.head_width, keys, keys


class Attention(nn.Module, ABC):
    """Projections around an attention; a subclass gives `attend`.

    `qkv` holds the rows of q, then k, then v. The numbers of heads are read from the tensors, so that a
    tensor-parallel rank, which holds a part of the heads, runs the same code: its part of the q, k and v
    rows has the same proportions. Under ALiBi it must know its first head.
    """

    returns = ("out",)
    group = "attention"

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        self.first_head = 0
        self.qkv = Linear(shape.width, sum(shape.qkv_features))
        self.out = Linear(shape.heads * shape.head_width, shape.width)
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_width, shape.norm_epsilon)
            self.k_norm = RMSNorm(shape.head_width, shape.norm_epsilon)

    @property
    def splits(self) -> Mapping[str, Split]:
        projections: dict[str, Split] = {"qkv": Column(self.shape.qkv_features), "out": Row()}
        return projections | {"q_norm": Shared(), "k_norm": Shared()}

    def take_part(self, part: Part) -> None:
        self.first_head = self.shape.heads // part.of * part.number

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None,
        state: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C). With a state, the T positions follow those it holds, and join it.

        positions_BT: (B, T), or (B, T, 2) for rotary embedding on two axes.
        """
        q_BTHD, k_BTKD, v_BTKD = self._project(x_BTC, positions_BT)
        if state is not None:
            k_BTKD, v_BTKD = state.append(k_BTKD, v_BTKD)
        attended_BTHD = self.attend(q_BTHD, k_BTKD, v_BTKD, segment_ids_BT, self.slopes(q_BTHD))
        out: Tensor = self.out(attended_BTHD.flatten(2))
        return out

    @abstractmethod
    def attend(
        self,
        q_BTHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        segment_ids_BT: Tensor | None,
        slopes_H: Tensor | None,
    ) -> Tensor:
        """Attention of the last T of S positions, (B, T, H, D): causal or not, as the shape says.

        slopes_H: ALiBi's, of these heads; None without ALiBi.
        """

    def slopes(self, q_BTHD: Tensor) -> Tensor | None:
        """ALiBi slopes of the heads that are here, (H,), or None without ALiBi."""
        if self.shape.positions != "alibi":
            return None
        slopes_H = alibi_slopes(self.shape.heads, device=q_BTHD.device)
        return slopes_H[self.first_head : self.first_head + q_BTHD.shape[2]]

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> KVCache:
        width = self.shape.head_width
        # Not the weight's shape: under ZeRO 3 the weight is not here between forward passes.
        key_heads = self.qkv.out_features // width // (self.shape.heads // self.shape.kv_heads + 2)
        return KVCache(batch, length, key_heads, width, device=device, dtype=dtype)

    def _project(self, x_BTC: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        group = self.shape.heads // self.shape.kv_heads
        qkv_BTHD = self.qkv(x_BTC).unflatten(2, (-1, self.shape.head_width))
        key_heads = qkv_BTHD.shape[2] // (group + 2)
        q_BTHD, k_BTKD, v_BTKD = qkv_BTHD.split((group * key_heads, key_heads, key_heads), dim=2)
        if self.shape.qk_norm:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if self.shape.positions == "rope":
            assert positions_BT is not None, "the decoder gives positions to rotary attention"
            table = rotary_table(positions_BT, self.shape.head_width, self.shape.rope_base)
            q_BTHD, k_BTKD = rotate(q_BTHD, table), rotate(k_BTKD, table)
        return q_BTHD, k_BTKD, v_BTKD
