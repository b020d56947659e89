"""The decoder-only Transformer that the attention families share; a family gives its mixer.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.declared import Matrix
from models.initialise import Constant, Normal, Rule
from models.layers.attention import Attention, AttentionShape
from models.layers.cache import KVCache
from models.layers.config import DecoderConfig
from models.layers.language_model import LanguageModel
from models.layers.mlp import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.recipes import recipe
from models.layers.transfer import Transfer, multipliers, residual_factor


class Branch(nn.Module):
    """What surrounds a branch f: `x + factor scale post(f(pre(x)))`, with post and scale if asked for; the factor is 1
    but in a model with a base model (`models.layers.transfer`)."""

    group = "norm"  # a scale's, too

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.pre = RMSNorm(config.width, config.norm_epsilon)
        self.post = RMSNorm(config.width, config.norm_epsilon) if config.norm == "hybrid" else None
        scaled = config.layer_scale is not None
        self.initial_scale = config.layer_scale
        self.scale = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.factor = residual_factor(config.transfer, config.layers)

    def initial_rules(self) -> dict[str, Rule]:
        return {} if self.initial_scale is None else {"scale": Constant(self.initial_scale)}

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

    mixer_name = "attention"

    def __init__(self, config: DecoderConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = SwiGLU(config.width, config.hidden_width)
        self.attention_branch = Branch(config)
        self.mlp_branch = Branch(config)
        self.needs_positions = attention.shape.positions == "rope"

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


def decoder(config: DecoderConfig, mixer: Callable[[AttentionShape], Attention]) -> LanguageModel:
    """A `LanguageModel` of attention blocks."""
    return LanguageModel(config, *decoder_parts(config, mixer))


def decoder_parts(
    config: DecoderConfig, mixer: Callable[[AttentionShape], Attention]
) -> tuple[Iterator[Block], RMSNorm, Callable[[Matrix], Rule]]:
    """Blocks, last norm and recipe."""
    shape = attention_shape(config)
    blocks = (Block(config, mixer(shape)) for _ in range(config.layers))
    return blocks, RMSNorm(config.width, config.norm_epsilon), decoder_recipe(config)


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


def decoder_recipe(config: DecoderConfig) -> Callable[[Matrix], Rule]:
    """How matrices start: by `config.initialisation`; with a base model, as the base's do, times what Complete(d)P
    says."""
    if config.transfer is None:
        return recipe(config.initialisation, 2 * config.layers)
    base = _base(config, config.transfer)
    of_base = recipe(config.initialisation, 2 * base.layers)
    by_size = multipliers(config.transfer, config.width, config.layers)

    def rule(matrix: Matrix) -> Rule:
        fan_in = base.hidden_width if matrix.name.endswith(".mlp.down.weight") else base.width
        plain = of_base(replace(matrix, fan_in=fan_in))
        assert isinstance(plain, Normal)
        kind = matrix.group if matrix.group in ("embedding", "head") else "matrix"
        return Normal(plain.deviation * by_size[kind].deviation)

    return rule


def _base(config: DecoderConfig, transfer: Transfer) -> DecoderConfig:
    """The base model, of the same proportions."""
    mlp_width = None if config.mlp_width is None else config.mlp_width * transfer.width // config.width
    return replace(config, width=transfer.width, layers=transfer.layers, mlp_width=mlp_width, transfer=None)
