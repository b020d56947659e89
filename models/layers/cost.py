"""What a model costs: FLOPs per token."""

from __future__ import annotations

from typing import Any


def flops_per_token(config: Any, sequence_length: int) -> float:
    """Training FLOPs per token: three times the forward's (one forward, two in the backward pass).

    Counted are the matrix products of the blocks (`block_products` of the config) and of the head, at 2 FLOPs per
    multiply-add. Norms, the embedding's lookup, and what is computed twice to save memory are not counted.
    """
    assert config.vocabulary is not None
    forward = 2 * (config.layers * config.block_products(sequence_length) + config.width * config.vocabulary)
    return 3.0 * forward
