"""What a decoder costs: FLOPs per token."""

from __future__ import annotations

from models.layers.config import DecoderConfig


def decoder_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Training FLOPs per token: three times the forward's (one forward, two in the backward pass).

    Counted are the matrix products, at 2 FLOPs per multiply-add: projections, feed-forward, attention's two
    products (at half the sequence length, the mean of a causal row) and the head. Norms, the embedding's
    lookup, and what is computed twice to save memory are not counted.
    """
    assert config.vocabulary is not None
    attention = config.width * (sum(config.qkv_features) + config.qkv_features[0])
    mlp = 3 * config.width * config.hidden_width
    pairs = 2 * config.qkv_features[0] * sequence_length / 2
    forward = 2 * (config.layers * (attention + mlp + pairs) + config.width * config.vocabulary)
    return 3.0 * forward
