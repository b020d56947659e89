"""The trimodal family: one bidirectional Transformer over text, image and audio tokens."""

from __future__ import annotations

from models.family import Family
from models.layers.recipe import DECODER_RECIPE
from models.trimodal.config import TrimodalConfig
from models.trimodal.model import Trimodal


def flops_per_token(config: TrimodalConfig, sequence_length: int) -> float:
    """Training FLOPs per token of the row, three times the forward's (one forward, two in the backward pass).

    As `models.layers.cost.flops_per_token` counts, but the head counts for `logit_share` of the tokens, as the
    others' logits are never made.
    """
    assert config.vocabulary is not None
    head = config.logit_share * config.width * config.vocabulary
    return 3.0 * 2 * (config.layers * config.block_products(sequence_length) + head)


trimodal = Family(
    name="trimodal",
    config=TrimodalConfig,
    build=Trimodal,
    flops_per_token=flops_per_token,
    recipe=DECODER_RECIPE,
)
