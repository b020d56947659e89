"""The sigmoid family: a decoder whose attention is a sigmoid of each score, with no normaliser."""

from __future__ import annotations

from functools import partial

from models.family import Family
from models.layers.cost import flops_per_token
from models.layers.decoder import decoder
from models.layers.language_model import LanguageModel
from models.layers.recipe import DECODER_RECIPE
from models.sigmoid.config import SigmoidConfig
from models.sigmoid.mixer import SigmoidAttention


def build(config: SigmoidConfig) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    if config.attention_bias is None:
        raise ValueError("attention_bias must be known to build the model: use config.resolved(...)")
    return decoder(config, partial(SigmoidAttention, bias=config.attention_bias))


sigmoid = Family(
    name="sigmoid",
    config=SigmoidConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=DECODER_RECIPE,
)
