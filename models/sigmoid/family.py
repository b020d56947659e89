"""The sigmoid family: a decoder whose attention is a sigmoid of each score, with no normaliser."""

from __future__ import annotations

from models.family import Family
from models.layers.cost import flops_per_token
from models.layers.decoder import decoder
from models.layers.language_model import LanguageModel
from models.layers.recipe import DECODER_RECIPE
from models.sigmoid.config import SigmoidConfig
from models.sigmoid.mixer import sigmoid_mixer


def build(config: SigmoidConfig) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    return decoder(config, sigmoid_mixer(config.attention_bias))


sigmoid = Family(
    name="sigmoid",
    config=SigmoidConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=DECODER_RECIPE,
)
