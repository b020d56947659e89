"""The softmax family: the baseline, equal to the sigmoid family but for the attention function."""

from __future__ import annotations

from models.family import Family
from models.layers.cost import decoder_flops_per_token
from models.layers.decoder import Decoder, parameter_group
from models.layers.recipe import DECODER_RECIPE
from models.layers.sharding import DECODER_SHARDING
from models.softmax.config import SoftmaxConfig
from models.softmax.mixer import SoftmaxAttention


def build(config: SoftmaxConfig) -> Decoder:
    """The network of a resolved config, its weights not yet drawn."""
    return Decoder(config, SoftmaxAttention)


softmax = Family(
    name="softmax",
    config=SoftmaxConfig,
    build=build,
    sharding=DECODER_SHARDING,
    flops_per_token=decoder_flops_per_token,
    parameter_group=parameter_group,
    recipe=DECODER_RECIPE,
)
