"""The layer around a mixer that has none of its own. Shape suffixes: B batch, T time, C model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.hybrid.mixers import Shape
from models.layers.mlp import SwiGLU
from models.layers.norm import RMSNorm


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))` if there is a feed-forward layer.

    mixer: called with (x_BTC, segment_ids_BT, positions_BT, state), it gives (B, T, C); with
        `new_state(batch, length, device, dtype)` for what it remembers while decoding. It declares what
        `models.declared` asks; `constant_state` and `needs_positions` as `LanguageModel` has them.
    """

    def __init__(self, mixer: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_norm = RMSNorm(shape.width, shape.norm_epsilon)
        self.mlp = SwiGLU(shape.width, shape.hidden_width) if shape.hidden_width else None
        self.mlp_norm = RMSNorm(shape.width, shape.norm_epsilon) if shape.hidden_width else None
        self.constant_state = bool(getattr(mixer, "constant_state", False))
        self.needs_positions = bool(getattr(mixer, "needs_positions", False))

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        state: Any = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x_BTC = x_BTC + self.mixer(self.mixer_norm(x_BTC), segment_ids_BT, positions_BT, state)
        if self.mlp is None or self.mlp_norm is None:
            return x_BTC
        out: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return out

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Any:
        return self.mixer.new_state(batch, length, device, dtype)  # type: ignore[operator]
