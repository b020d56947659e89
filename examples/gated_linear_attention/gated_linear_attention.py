"""Gated linear attention, a mixer of one's own: `S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.
The state is stepped through in time, so this form is for reading, not for speed.

Shape suffixes: B batch, T time, C model width, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.declared import Crossing
from models.hybrid.mixers import MixerSettings, Shape, divided
from models.layers.config import Problem, divisors, undivided
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.layers.recurrent import RecurrentState
from models.sharding import Column, Row, Shared, Split

DECAY_TEMPERATURE = 16.0
"""tau of the paper: a = sigmoid(...) ** (1 / tau), so that a new model forgets slowly."""


@dataclass(frozen=True, kw_only=True)
class GatedLinear(MixerSettings):
    """`heads` divide the width; keys have `key_width` numbers per head, values width / heads."""

    mixer: ClassVar[str] = "gated_linear_attention:GatedLinearAttention"
    ways: ClassVar[tuple[str, ...]] = ("swap",)

    heads: int
    key_width: int = 16

    def problems(self, shape: Shape, sequence_length: int) -> list[Problem]:
        found = [(key, "must be at least 1") for key in ("heads", "key_width") if getattr(self, key) < 1]
        if not found and shape.width % self.heads:
            message = (
                f"width {shape.width} does not divide by {self.heads} heads; use {divisors(shape.width)}"
            )
            found.append(("heads", message))
        return found

    def products(self, shape: Shape, sequence_length: int) -> float:
        keys = self.heads * self.key_width
        projections = shape.width * (3 * keys + 3 * shape.width)
        return projections + 2 * keys * shape.width / self.heads  # k v^T, and the state with q

    def division_problems(self, shape: Shape, parts: int) -> list[str]:
        return divided(shape, {"heads": self.heads}, parts)

    def swap_problems(self, shape: Shape, parts: int) -> list[str]:
        return undivided({"heads": self.heads}, parts)


class GatedLinearAttention(nn.Module):
    """`out(norm(scan(q, k, v, decay)) * silu(gate))`, each head by itself."""

    splits: ClassVar[Mapping[str, Split]] = {
        "q": Column(),
        "k": Column(),
        "v": Column(),
        "decay": Column(),
        "gate": Column(),
        "norm": Shared(),
        "out": Row(),
    }
    crossing = Crossing("scan", ("swap",), axes=("BTH", "BTH", "BTH", "BTH", "", ""))
    returns = ("out",)
    group = "recurrence"
    constant_state = True

    def __init__(self, settings: GatedLinear, shape: Shape) -> None:
        super().__init__()
        keys, values = settings.heads * settings.key_width, shape.width
        self.key_width, self.value_width = settings.key_width, shape.width // settings.heads
        self.q, self.k, self.decay = (Linear(shape.width, keys) for _ in range(3))
        self.v, self.gate = Linear(shape.width, values), Linear(shape.width, values)
        self.norm = RMSNorm(self.value_width, shape.norm_epsilon)
        self.out = Linear(values, shape.width)

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        state: RecurrentState | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C). With a state, the T positions follow those it has read."""
        q_BTHK, k_BTHK, decay_BTHK = (
            layer(x_BTC).unflatten(2, (-1, self.key_width)) for layer in (self.q, self.k, self.decay)
        )
        v_BTHV = self.v(x_BTC).unflatten(2, (-1, self.value_width))
        log_decay_BTHK = functional.logsigmoid(decay_BTHK.float()) / DECAY_TEMPERATURE
        before = None if state is None else state.hidden
        out_BTHV, hidden = self.scan(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, segment_ids_BT, before)
        if state is not None:
            state.hidden = hidden
        gated_BTHV = self.norm(out_BTHV) * functional.silu(
            self.gate(x_BTC).unflatten(2, (-1, self.value_width))
        )
        out: Tensor = self.out(gated_BTHV.flatten(2))
        return out

    def scan(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        segment_ids_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H, V) and the last state (B, H, K, V): all that one position learns of others."""
        dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
        batch, time, heads, _ = v_BTHV.shape
        state = v_BTHV.new_zeros(batch, heads, self.key_width, self.value_width, dtype=dtype)
        state = state if state_BHKV is None else state_BHKV
        outputs = []
        for t in range(time):
            if segment_ids_BT is not None and t > 0:
                same_B = segment_ids_BT[:, t] == segment_ids_BT[:, t - 1]
                state = state * same_B[:, None, None, None]
            state = state * log_decay_BTHK[:, t].to(dtype).exp()[..., None]
            state = state + k_BTHK[:, t].to(dtype)[..., None] * v_BTHV[:, t].to(dtype)[:, :, None]
            outputs.append((state * q_BTHK[:, t].to(dtype)[..., None]).sum(2))
        return (torch.stack(outputs, 1) * self.key_width**-0.5).to(v_BTHV.dtype), state

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> RecurrentState:
        # Not the weight's own size: under ZeRO 3 it is not here between forward passes.
        heads = self.v.out_features // self.value_width
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        hidden = torch.zeros(batch, heads, self.key_width, self.value_width, device=device, dtype=wide)
        return RecurrentState(torch.zeros(batch, 0, 1, device=device, dtype=dtype), hidden)
