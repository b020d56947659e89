"""The hybrid family: decoders whose layers are of several kinds, in a pattern."""

from __future__ import annotations

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
from models.own import named
from models.pararnn.family import RECIPE
from models.sigmoid.config import SigmoidConfig
from models.sigmoid.mixer import sigmoid_mixer
from models.softmax.mixer import SoftmaxAttention


def build(config: HybridConfig) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    used, shape = config.used, config.shape
    branches = sum(2 if shape.hidden_width and used[name].has_mlp else 1 for name in config.layer_mixers)
    return LanguageModel(
        config,
        blocks=(build_block(used[name], shape) for name in config.layer_mixers),
        norm=RMSNorm(config.width, config.norm_epsilon),
        recipe=recipe(config.initialisation, branches),
    )


def build_block(settings: MixerSettings, shape: Shape) -> nn.Module:
    """A layer of one kind."""
    if isinstance(settings, FamilyMixer):
        block: nn.Module = named(settings.block)(settings.config(shape))
        return block
    return generic.Block(named(settings.mixer)(settings, shape), shape)


def attention_block(config: DecoderConfig) -> AttentionBlock:
    shape = attention_shape(config)
    mixer = sigmoid_mixer(config.attention_bias) if isinstance(config, SigmoidConfig) else SoftmaxAttention
    return AttentionBlock(config, mixer(shape))


hybrid = Family(
    name="hybrid",
    config=HybridConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=RECIPE,  # nobody has published one for these stacks: the pararnn family's, whose layers are the most
)
