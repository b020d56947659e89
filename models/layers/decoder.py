"""The decoder-only Transformer that the attention families share; a family gives its mixer.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.initialise import Constant, Normal, Rule
from models.layers.attention import Attention, AttentionShape
from models.layers.cache import KVCache
from models.layers.config import DecoderConfig
from models.layers.linear import Embedding, Linear
from models.layers.mlp import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.positions import row_positions


class Branch(nn.Module):
    """What surrounds a branch f: `x + scale post(f(pre(x)))`, with post and scale if asked for."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.pre = RMSNorm(config.width, config.norm_epsilon)
        self.post = RMSNorm(config.width, config.norm_epsilon) if config.norm == "hybrid" else None
        scaled = config.layer_scale is not None
        self.scale = nn.Parameter(torch.empty(config.width)) if scaled else None

    def enter(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.pre(x_BTC)
        return out

    def leave(self, x_BTC: Tensor, branch_BTC: Tensor) -> Tensor:
        if self.post is not None:
            branch_BTC = self.post(branch_BTC)
        if self.scale is not None:
            branch_BTC = branch_BTC * self.scale
        return x_BTC + branch_BTC


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


class Decoder(nn.Module):
    """Tokens to hidden states; `head` maps hidden states to logits.

    With a tied head, `head.weight` is `embedding.weight`, listed once, under that name.
    """

    def __init__(self, config: DecoderConfig, mixer: Callable[[AttentionShape], Attention]) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("vocabulary must be known to build the model: use config.resolved(...)")
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        shape = attention_shape(config)
        self.blocks = nn.ModuleList(Block(config, mixer(shape)) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = Linear(config.width, config.vocabulary)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        state: list[KVCache] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm.

        Args:
            tokens_BT: integers below the vocabulary.
            segment_ids_BT: which document of the row each token is of; None: each row is one document.
            positions_BT: each token's position in its document, for RoPE; None: counted along the row (and
                on from the state).
            state: from `new_state`, for decoding: the tokens follow those seen, and the state grows in place.
                Not together with segment ids.
        """
        if state is not None and segment_ids_BT is not None:
            raise ValueError("segment_ids_BT cannot be used with a state: decode one document per row")
        if positions_BT is None and self.config.positions == "rope":
            positions_BT = row_positions(tokens_BT, 0 if state is None else state[0].length)
        x_BTC = self.embedding(tokens_BT)
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, segment_ids_BT, positions_BT, None if state is None else state[layer])
        hidden: Tensor = self.norm(x_BTC)
        return hidden

    def new_state(
        self,
        batch: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[KVCache]:
        """Empty caches, one per layer, for `batch` rows of up to `length` tokens."""
        attentions = [block.attention for block in self.blocks if isinstance(block, Block)]
        return [attention.new_state(batch, length, device, dtype) for attention in attentions]

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
    """Norms start at one, layer scales at their setting, matrices by `config.initialisation`."""
    if name.endswith(".scale"):
        assert config.layer_scale is not None, name
        return Constant(config.layer_scale)
    group = parameter_group(name)
    if group == "norm":
        return Constant(1.0)
    returns = name.endswith((".attention.out.weight", ".mlp.down.weight"))
    if config.initialisation == "small":
        return Normal(0.02 / (2 * config.layers) ** 0.5 if returns else 0.02)
    fan_in = config.hidden_width if name.endswith(".mlp.down.weight") else config.width
    return Normal(fan_in**-0.5)
