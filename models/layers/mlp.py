"""The gated feed-forward layer. Shape suffixes: B batch, T time, C model width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from models.layers.linear import Linear
from models.layers.recompute import recomputed
from models.sharding import Column, Row, Split


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Source: Shazeer, "GLU Variants Improve Transformer".

    Gate and up are two weights, so that each splits over ranks by its own rows. With `recompute` two of the
    four vectors of the hidden width are not kept: the activated gate and its product with up.
    """

    splits: ClassVar[Mapping[str, Split]] = {"gate": Column(), "up": Column(), "down": Row()}
    returns = ("down",)
    group = "mlp"

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.recompute = False
        self.gate = Linear(width, hidden_width)
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = recomputed(self.recompute, self._activated, self.gate(x_BTC), self.up(x_BTC))
        return out

    def _activated(self, gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(gate) * up)
        return out
