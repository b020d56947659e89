"""The recurrent mixer and its block. Shape suffixes: B batch, T time, C model width, W taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.initialise import Constant, Rule
from models.layers.conv import CausalConv, last_inputs
from models.layers.linear import Linear
from models.layers.mlp import SwiGLU
from models.layers.norm import GatedRMSNorm, RMSNorm
from models.layers.recompute import recomputed
from models.layers.recurrent import RecurrentState
from models.pararnn.cells import CELLS, Cell, CellShape
from models.pararnn.config import ParaRNNConfig
from models.sharding import Channels, Column, Row, Split


class RecurrentMixer(nn.Module):
    """`out(norm(cell(silu(conv(input(x)))) * silu(gate(x))))`.

    Source: Danieli et al., "ParaRNN", section C.1 and figure 9; the activations and the norm's place, which
    it leaves open, are Mamba-2's. Input and gate are two weights, so that each splits over ranks by its rows.
    With `recompute` the activated gate, its product with the cell's output, and the norm of that are not kept.
    """

    # The gated norm's mean square is over all channels: a part sums over the parts.
    splits: ClassVar[Mapping[str, Split]] = {
        "input": Column(),
        "gate": Column(),
        "conv": Channels({"weight": 0, "bias": 0}),
        "norm": Channels({"weight": 0}),
        "out": Row(),
    }
    crossing = ("conv", "cell")
    returns = ("out",)
    group = "recurrence"

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__()
        width = config.width
        self.recompute = False
        self.input = Linear(width, width)
        self.gate = Linear(width, width)
        self.conv = CausalConv(width, config.conv_width)
        self.cell = build_cell(config)
        self.norm = GatedRMSNorm(width, config.norm_epsilon)
        self.out = Linear(width, width)

    def forward(
        self, x_BTC: Tensor, segment_ids_BT: Tensor | None, state: RecurrentState | None = None
    ) -> Tensor:
        """(B, T, C) to (B, T, C). With a state, the T positions follow those it has read, and it reads them."""
        u_BTC = self.input(x_BTC)
        before_BWC = None if state is None else state.inputs_BWC
        convolved_BTC = functional.silu(self.conv(u_BTC, segment_ids_BT, before_BWC))
        y_BTC, hidden = self.cell(convolved_BTC, segment_ids_BT, None if state is None else state.hidden)
        if state is not None:
            state.inputs_BWC = last_inputs(u_BTC, segment_ids_BT, before_BWC, self.conv.taps - 1)
            state.hidden = hidden
        out: Tensor = recomputed(self.recompute, self._gated, y_BTC, self.gate(x_BTC))
        return out

    def _gated(self, y_BTC: Tensor, gate_BTC: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(y_BTC, gate_BTC))
        return out


class Block(nn.Module):
    """`skip x + mixer(norm(x))` with a learned factor per feature, then the feed-forward layer if there is one."""

    group = "norm"  # the skip's factor
    constant_state = True

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__()
        self.mixer = RecurrentMixer(config)
        self.mixer_norm = RMSNorm(config.width, config.norm_epsilon)
        self.skip = nn.Parameter(torch.empty(config.width))
        self.mlp = SwiGLU(config.width, config.hidden_width) if config.hidden_width else None
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon) if config.hidden_width else None

    def initial_rules(self) -> dict[str, Rule]:
        return {"skip": Constant(1.0)}

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        state: RecurrentState | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C). Positions are not used: the recurrence knows the order."""
        if state is not None:
            state.check_rows(x_BTC.shape[0])
        mixed_BTC = self.mixer(self.mixer_norm(x_BTC), segment_ids_BT, state)
        x_BTC = torch.addcmul(mixed_BTC, x_BTC, self.skip)
        if self.mlp is None or self.mlp_norm is None:
            return x_BTC
        out: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return out

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> RecurrentState:
        """Before the first position. The length has no say."""
        # Not a weight's shape: under ZeRO 3 the weights are not here between forward passes.
        cell, taps = self.mixer.cell, self.mixer.conv.taps
        inputs_BWC = torch.zeros(batch, taps - 1, cell.shape.width, device=device, dtype=dtype)
        return RecurrentState(inputs_BWC, cell.new_state(batch, device, dtype))


class MixerBlock(nn.Module):
    """The cell and nothing else, as the paper's smallest task models have it."""

    mixer_name = "cell"
    constant_state = True

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__()
        self.cell = build_cell(config)

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        state: RecurrentState | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if state is not None:
            state.check_rows(x_BTC.shape[0])
        y_BTC, hidden = self.cell(x_BTC, segment_ids_BT, None if state is None else state.hidden)
        if state is not None:
            state.hidden = hidden
        return cast(Tensor, y_BTC)

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> RecurrentState:
        inputs_BWC = torch.zeros(batch, 0, self.cell.shape.width, device=device, dtype=dtype)
        return RecurrentState(inputs_BWC, self.cell.new_state(batch, device, dtype))


def build_cell(config: ParaRNNConfig) -> Cell:
    return CELLS[config.cell](cell_shape(config))


def cell_shape(config: ParaRNNConfig) -> CellShape:
    return CellShape(width=config.width, heads=config.heads, clip=config.recurrent_clip, solver=config.newton)
