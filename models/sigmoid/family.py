"""The sigmoid family: a decoder whose attention is a sigmoid of each score, with no normaliser."""

from __future__ import annotations

from functools import partial

from models.family import Family
from models.layers.cost import decoder_flops_per_token
from models.layers.decoder import Decoder, parameter_group
from models.layers.recipe import DECODER_RECIPE
from models.layers.sharding import DECODER_SHARDING
from models.sigmoid.config import SigmoidConfig
from models.sigmoid.mixer import SigmoidAttention


def build(config: SigmoidConfig) -> Decoder:
    """The network of a resolved config, its weights not yet drawn."""
    if config.attention_bias is None:
        raise ValueError("attention_bias must be known to build the model: use config.resolved(...)")
    return Decoder(config, partial(SigmoidAttention, bias=config.attention_bias))


sigmoid = Family(
    name="sigmoid",
    config=SigmoidConfig,
    build=build,
    sharding=DECODER_SHARDING,
    flops_per_token=decoder_flops_per_token,
    parameter_group=parameter_group,
    recipe=DECODER_RECIPE,
)
