"""The hybrid family: decoders whose layers are of several kinds, in a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from models.family import Family
from models.hybrid import block as generic
from models.hybrid.config import HybridConfig
from models.hybrid.mixers import FamilyMixer, MixerSettings, Shape
from models.layers.config import DecoderConfig
from models.layers.cost import flops_per_token
from models.layers.decoder import Block as AttentionBlock
from models.layers.decoder import attention_shape
from models.layers.language_model import LanguageModel
from models.layers.norm import RMSNorm
from models.layers.recipes import recipe
from models.sigmoid.config import SigmoidConfig
from models.sigmoid.mixer import SigmoidAttention
from models.softmax.mixer import SoftmaxAttention

# Nobody has published a recipe for these stacks; this is the pararnn family's, whose layers are the most.
RECIPE: Mapping[str, Any] = {
    "lr": 3e-3,
    "matrix_lr_multiplier": 1.0,
    "betas": (0.9, 0.95),
    "epsilon": 1e-8,
    "weight_decay": 3e-7,
    "clip_norm": 1.0,
    "warmup_steps": 5500,
    "schedule": "cosine",
    "final_lr_fraction": 0.0,
}


def build(config: HybridConfig) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    used, shape = config.used, config.shape
    branches = sum(2 if has_mlp(used[name], shape) else 1 for name in config.layer_mixers)
    return LanguageModel(
        config,
        blocks=(build_block(used[name], shape) for name in config.layer_mixers),
        norm=RMSNorm(config.width, config.norm_epsilon),
        recipe=recipe(config.initialisation, branches),
    )


def build_block(settings: MixerSettings, shape: Shape) -> nn.Module:
    """A layer of one kind."""
    if isinstance(settings, FamilyMixer):
        block: nn.Module = found(settings.block)(settings.config(shape))
        return block
    return generic.Block(found(settings.mixer)(settings, shape), shape)


def attention_block(config: DecoderConfig) -> AttentionBlock:
    shape = attention_shape(config)
    if isinstance(config, SigmoidConfig):
        if config.attention_bias is None:
            raise ValueError("attention_bias must be known to build the model: use config.resolved(...)")
        return AttentionBlock(config, SigmoidAttention(shape, config.attention_bias))
    return AttentionBlock(config, SoftmaxAttention(shape))


def has_mlp(settings: MixerSettings, shape: Shape) -> bool:
    """Whether a layer of this kind has a second branch off the residual stream."""
    return bool(shape.hidden_width) and getattr(settings, "has_mlp", True)


def found(path: str) -> Any:
    """What "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


hybrid = Family(
    name="hybrid",
    config=HybridConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=RECIPE,
)
