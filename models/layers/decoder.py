"""The decoder-only Transformer that the attention families share; a family gives its mixer.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.initialise import Constant, Normal, Rule
from models.layers.attention import Attention, AttentionShape
from models.layers.cache import KVCache
from models.layers.config import DecoderConfig
from models.layers.language_model import LanguageModel
from models.layers.mlp import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.positions import row_positions
from models.layers.transfer import Transfer, multipliers, residual_factor


class Branch(nn.Module):
    """What surrounds a branch f: `x + factor scale post(f(pre(x)))`, with post and scale if asked for; the factor is 1
    but in a model with a base model (`models.layers.transfer`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.pre = RMSNorm(config.width, config.norm_epsilon)
        self.post = RMSNorm(config.width, config.norm_epsilon) if config.norm == "hybrid" else None
        scaled = config.layer_scale is not None
        self.scale = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.factor = residual_factor(config.transfer, config.layers)

    def enter(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.pre(x_BTC)
        return out

    def leave(self, x_BTC: Tensor, branch_BTC: Tensor) -> Tensor:
        if self.post is not None:
            branch_BTC = self.post(branch_BTC)
        if self.scale is not None:
            branch_BTC = branch_BTC * self.scale
        return torch.add(x_BTC, branch_BTC, alpha=self.factor)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on its own branch of the residual stream."""

    def __init__(self, config: DecoderConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = SwiGLU(config.width, config.hidden_width)
        self.attention_branch = Branch(config)
        self.mlp_branch = Branch(config)

    def forward(
        self,
        x_BTC: Tensor,
        segment_ids_BT: Tensor | None,
        positions_BT: Tensor | None,
        state: KVCache | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_branch.enter(x_BTC), segment_ids_BT, positions_BT, state)
        x_BTC = self.attention_branch.leave(x_BTC, attended)
        return self.mlp_branch.leave(x_BTC, self.mlp(self.mlp_branch.enter(x_BTC)))

    def new_state(
        self, batch: int, length: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> KVCache:
        return self.attention.new_state(batch, length, device, dtype)


class Decoder(LanguageModel):
    """A `LanguageModel` of attention blocks."""

    def __init__(self, config: DecoderConfig, mixer: Callable[[AttentionShape], Attention]) -> None:
        shape = attention_shape(config)
        super().__init__(
            vocabulary=config.vocabulary,
            width=config.width,
            blocks=(Block(config, mixer(shape)) for _ in range(config.layers)),
            norm=RMSNorm(config.width, config.norm_epsilon),
            tied_head=config.tied_head,
        )
        self.config = config

    def forward(
        self,
        tokens_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        state: list[KVCache] | None = None,
        hidden_BTC: Tensor | None = None,
    ) -> Tensor:
        """As `LanguageModel.forward`. Segment ids cannot be used together with a state."""
        if state is not None and segment_ids_BT is not None:
            raise ValueError("segment_ids_BT cannot be used with a state: decode one document per row")
        if positions_BT is None and self.config.positions == "rope":
            positions_BT = row_positions(tokens_BT, 0 if state is None else state[0].length)
        return super().forward(tokens_BT, segment_ids_BT, positions_BT, state, hidden_BTC)

    def initial_rule(self, name: str) -> Rule:
        """How `models.initialise` draws the parameter of this name."""
        return initial_rule(self.config, name)


def attention_shape(config: DecoderConfig) -> AttentionShape:
    return AttentionShape(
        width=config.width,
        heads=config.heads,
        kv_heads=config.key_heads,
        positions=config.positions,
        rope_base=config.rope_base,
        qk_norm=config.qk_norm,
        norm_epsilon=config.norm_epsilon,
        causal=config.causal,
    )


def parameter_group(name: str) -> str:
    """ "embedding", "attention", "mlp", "norm" or "head": the part of the model a parameter belongs to."""
    parts = name.split(".")
    if "norm" in name or "branch" in name:
        return "norm"
    for group in ("attention", "mlp", "embedding", "head"):
        if group in parts:
            return group
    raise ValueError(f"{name} is no parameter of a decoder")


def initial_rule(config: DecoderConfig, name: str) -> Rule:
    """Norms start at one, layer scales at their setting, matrices by `config.initialisation`; with a base model, as
    the base's do, times what Complete(d)P says."""
    if name.endswith(".scale"):
        assert config.layer_scale is not None, name
        return Constant(config.layer_scale)
    group = parameter_group(name)
    if group == "norm":
        return Constant(1.0)
    if config.transfer is None:
        return Normal(_deviation(config, name))
    kind = group if group in ("embedding", "head") else "matrix"
    by_size = multipliers(config.transfer, config.width, config.layers)
    return Normal(_deviation(_base(config, config.transfer), name) * by_size[kind].deviation)


def _deviation(config: DecoderConfig, name: str) -> float:
    returns = name.endswith((".attention.out.weight", ".mlp.down.weight"))
    if config.initialisation == "small":
        return 0.02 / (2 * config.layers) ** 0.5 if returns else 0.02
    fan_in = config.hidden_width if name.endswith(".mlp.down.weight") else config.width
    return float(fan_in**-0.5)


def _base(config: DecoderConfig, transfer: Transfer) -> DecoderConfig:
    """The base model, of the same proportions."""
    mlp_width = None if config.mlp_width is None else config.mlp_width * transfer.width // config.width
    return replace(config, width=transfer.width, layers=transfer.layers, mlp_width=mlp_width, transfer=None)
