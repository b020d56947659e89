"""What a decoder costs: FLOPs per token and the memory of saved activations."""

from __future__ import annotations

from models.layers.config import DecoderConfig
from models.layers.loss import default_chunk_tokens


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


def decoder_activation_bytes(
    config: DecoderConfig, tokens: int, sequence_length: int, bytes_per_element: int, *, masked_softmax: bool
) -> int:
    """Estimate of what one micro-batch's forward pass keeps for its backward, without checkpointing.

    Per token and layer: the inputs of the norms, of the projections and of the attention, and four vectors of
    the feed-forward's hidden width; then the final norm and one chunk of fp32 log-probabilities.
    `masked_softmax`: each layer also keeps an additive mask of (heads, length, length).
    """
    assert config.vocabulary is not None
    q, k, v = config.qkv_features
    norms = (3 if config.norm == "hybrid" else 2) * config.width * 2
    scales = 2 * config.width if config.layer_scale is not None else 0
    turned = q + k if config.qk_norm or config.positions == "rope" else 0
    per_layer = norms + scales + q + k + v + turned + q + 4 * config.hidden_width
    mask = config.heads * sequence_length**2 if masked_softmax else 0
    body = bytes_per_element * (
        tokens * (config.layers * per_layer + 2 * config.width) + config.layers * mask
    )
    logits = 4 * config.vocabulary * min(tokens, default_chunk_tokens(config.vocabulary))
    return body + logits
