"""The Mamba-2 mixer and its block.

Shape suffixes: B batch, T time, C model width, E channels of the state space, H heads, P head width, G groups,
N state width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.declared import Crossing
from models.initialise import Constant, LogOfUniform, Rule, SoftplusLogUniform
from models.layers.conv import CausalConv, last_inputs
from models.layers.linear import Linear
from models.layers.norm import GatedRMSNorm, RMSNorm
from models.layers.recompute import recomputed
from models.layers.recurrent import RecurrentState
from models.mamba2.config import Mamba2Config
from models.mamba2.ssd import SSMInputs, ssm
from models.sharding import Channels, Column, Part, Row, Shared, Split


class Mamba2Mixer(nn.Module):
    """Gate, convolution, state space, gated norm and projection back.

    Source: Dao and Gu, "Transformers are SSMs", figure 6 (the parallel block) and its authors' code. The fused
    projection of that code is four weights here, so that each splits over ranks by its own rows.
    With `recompute` nothing within the state space is kept, nor the gating's products.
    """

    # The maps b and c are shared by all heads of a group. The gated norm's mean square is over a group's channels:
    # parts that hold pieces of one sum over these.
    splits: ClassVar[Mapping[str, Split]] = {
        "": Channels({"log_rate": 0, "step_bias": 0, "direct": 0}),
        "gate": Column(),
        "input": Column(),
        "step": Column(),
        "maps": Shared(),
        "maps_conv": Shared(),
        "conv": Channels({"weight": 0, "bias": 0}),
        "norm": Channels({"weight": 0}),
        "out": Row(),
    }
    crossing = (Crossing("scan", ("swap_state",)), "conv", "maps_conv")
    returns = ("out",)
    group = "recurrence"

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.channels, self.heads = config.channels, config.heads
        self.groups = slice(0, config.groups)
        maps = 2 * config.groups * config.state_width
        self.gate = Linear(config.width, config.channels)
        self.input = Linear(config.width, config.channels)
        self.maps = Linear(config.width, maps)
        self.step = Linear(config.width, config.heads)
        self.conv = CausalConv(config.channels, config.conv_width)
        self.maps_conv = CausalConv(maps, config.conv_width)
        self.log_rate = nn.Parameter(torch.empty(config.heads))
        self.step_bias = nn.Parameter(torch.empty(config.heads))
        self.direct = nn.Parameter(torch.empty(config.heads))
        self.norm = GatedRMSNorm(config.channels, config.norm_epsilon, config.norm_groups)
        self.out = Linear(config.channels, config.width)

    def initial_rules(self) -> dict[str, Rule]:
        """As Mamba-2's authors: rates in 1 ... 16, step sizes in 0.001 ... 0.1."""
        return {
            "log_rate": LogOfUniform(1.0, 16.0),
            "step_bias": SoftplusLogUniform(0.001, 0.1),
            "direct": Constant(1.0),
        }

    def take_part(self, part: Part) -> None:
        """Some of the heads, and the groups whose maps they use."""
        of_group, heads = self.heads // self.config.groups, self.heads // part.of
        first = heads * part.number // of_group
        self.groups = slice(first, first + max(1, heads // of_group))
        self.channels, self.heads = self.channels // part.of, heads

    def forward(
        self, x_BTC: Tensor, segment_ids_BT: Tensor | None, state: RecurrentState | None = None
    ) -> Tensor:
        """(B, T, C) to (B, T, C). With a state, the T positions follow those it has read, and it reads them."""
        u_BTE, maps_BTE = self._convolved(x_BTC, segment_ids_BT, state)
        wide = torch.promote_types(x_BTC.dtype, torch.float32)
        in_BTGN, out_BTGN = maps_BTE.unflatten(2, (2, self.config.groups, -1))[:, :, :, self.groups].unbind(2)
        inputs = SSMInputs(
            x_BTHP=u_BTE.unflatten(2, (-1, self.config.head_width)),
            dt_BTH=functional.softplus(self.step(x_BTC).to(wide) + self.step_bias.to(wide)),
            rate_H=-self.log_rate.to(wide).exp(),
            in_BTGN=in_BTGN,
            out_BTGN=out_BTGN,
            state_BHPN=None if state is None else state.hidden,
            segment_ids_BT=segment_ids_BT,
        )
        y_BTHP, hidden = recomputed(self.recompute, self.scan, inputs)
        if state is not None:
            state.hidden = hidden
        y_BTHP = torch.addcmul(y_BTHP, inputs.x_BTHP, self.direct[:, None])
        out: Tensor = recomputed(self.recompute, self._gated, y_BTHP.flatten(2), self.gate(x_BTC))
        return out

    def _gated(self, y_BTE: Tensor, gate_BTE: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(y_BTE, gate_BTE))
        return out

    def scan(self, inputs: SSMInputs) -> tuple[Tensor, Tensor]:
        """The recurrence over all positions: its outputs (B, T, H, P) and its last state (B, H, P, N)."""
        return ssm(inputs, self.config.chunk, self.config.kernel)

    def _convolved(
        self, x_BTC: Tensor, segment_ids_BT: Tensor | None, state: RecurrentState | None
    ) -> tuple[Tensor, Tensor]:
        """The state space's inputs and maps after convolution and activation."""
        parts = self.input(x_BTC), self.maps(x_BTC)
        before = (None, None) if state is None else state.inputs_BWC.split([p.shape[2] for p in parts], 2)
        if state is not None:
            joined = torch.cat(parts, 2)
            state.inputs_BWC = last_inputs(joined, segment_ids_BT, state.inputs_BWC, self.conv.taps - 1)
        u_BTE = functional.silu(self.conv(parts[0], segment_ids_BT, before[0]))
        maps_BTE = functional.silu(self.maps_conv(parts[1], segment_ids_BT, before[1]))
        return u_BTE, maps_BTE


class Block(nn.Module):
    """`x + mixer(norm(x))`."""

    constant_state = True

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.mixer = Mamba2Mixer(config)
        self.mixer_norm = RMSNorm(config.width, config.norm_epsilon)

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
        out: Tensor = x_BTC + self.mixer(self.mixer_norm(x_BTC), segment_ids_BT, state)
        return out

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> RecurrentState:
        """Before the first position. The length has no say."""
        config = self.mixer.config
        inputs = self.mixer.channels + 2 * config.groups * config.state_width
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        hidden = (batch, self.mixer.heads, config.head_width, config.state_width)
        return RecurrentState(
            torch.zeros(batch, config.conv_width - 1, inputs, device=device, dtype=dtype),
            torch.zeros(hidden, device=device, dtype=wide),
        )
