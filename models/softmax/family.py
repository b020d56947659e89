"""The softmax family: the baseline, equal to the sigmoid family but for the attention function."""

from __future__ import annotations

from models.family import Family
from models.layers.cost import flops_per_token
from models.layers.decoder import decoder
from models.layers.language_model import LanguageModel
from models.layers.recipe import DECODER_RECIPE
from models.softmax.config import SoftmaxConfig
from models.softmax.mixer import SoftmaxAttention


def build(config: SoftmaxConfig) -> LanguageModel:
    """The network of a resolved config, its weights not yet drawn."""
    return decoder(config, SoftmaxAttention)


softmax = Family(
    name="softmax",
    config=SoftmaxConfig,
    build=build,
    flops_per_token=flops_per_token,
    recipe=DECODER_RECIPE,
)
