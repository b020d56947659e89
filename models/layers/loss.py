"""Cross-entropy from hidden states, without keeping the logits of a whole batch.

Shape suffixes: B batch, T time, N tokens (B T, or some of them), C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# 256 MiB of fp32: a demo's batch is one chunk; of a vocabulary of 32,768 a chunk has 2,048 tokens.
LOGITS_PER_CHUNK = 2**26


def default_chunk_tokens(vocabulary: int) -> int:
    return max(1, LOGITS_PER_CHUNK // vocabulary)


def token_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden_BTC: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' cross-entropies in nats, and the z term: two fp32 scalars.

    Args:
        head: hidden states to logits, called as a module, so that hooks on it run. A wrong target of a token
            with weight 0 is never looked at, if it is a valid token.
        z_loss: the z term is z_loss times the weighted sum of logsumexp(logits)^2 (Chowdhery et al., "PaLM");
            it is returned apart, so that the reported loss stays pure. 0 costs nothing.
        chunk_tokens: with more tokens than this, logits are made and dropped chunk by chunk and made again
            in the backward pass. `default_chunk_tokens(vocabulary)` is a good value.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if not hidden_BTC.shape[:2] == targets_BT.shape == weights_BT.shape:
        raise ValueError(
            f"targets_BT {tuple(targets_BT.shape)} and weights_BT {tuple(weights_BT.shape)} must have the "
            f"batch and time of hidden_BTC {tuple(hidden_BTC.shape)}"
        )
    hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
    weights_N = weights_BT.flatten().float()
    if hidden_NC.shape[0] <= chunk_tokens:
        return _chunk_loss(head, hidden_NC, targets_N, weights_N, z_loss)
    loss = z_term = hidden_BTC.new_zeros((), dtype=torch.float32)
    parts = (x.split(chunk_tokens) for x in (hidden_NC, targets_N, weights_N))
    for hidden, targets, weights in zip(*parts, strict=True):
        chunk, chunk_z = checkpoint(
            _chunk_loss, head, hidden, targets, weights, z_loss, use_reentrant=False, preserve_rng_state=False
        )
        loss, z_term = loss + chunk, z_term + chunk_z
    return loss, z_term


def each_cross_entropy(
    logits_of: Callable[[Tensor], Tensor], hidden_NC: Tensor, targets_N: Tensor, *, chunk_tokens: int
) -> Tensor:
    """The cross-entropy of every token in nats, (N,) fp32; N may be 0.

    Args:
        logits_of: hidden states (n, C) to logits (n, V), through the head as a module, so that hooks on it run.
        chunk_tokens: as in `token_cross_entropy`.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if hidden_NC.shape[:1] != targets_N.shape:
        raise ValueError(
            f"targets_N {tuple(targets_N.shape)} must have one target per row of hidden_NC {tuple(hidden_NC.shape)}"
        )
    if hidden_NC.shape[0] <= chunk_tokens:
        return _each_of_chunk(logits_of, hidden_NC, targets_N)
    chunks = zip(hidden_NC.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    return torch.cat(
        [
            checkpoint(
                _each_of_chunk, logits_of, hidden, targets, use_reentrant=False, preserve_rng_state=False
            )
            for hidden, targets in chunks
        ]
    )


def _each_of_chunk(logits_of: Callable[[Tensor], Tensor], hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
    return cross_entropy(logits_of(hidden_NC).float(), targets_N, reduction="none")


def _chunk_loss(
    head: Callable[[Tensor], Tensor], hidden_NC: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits_NV = head(hidden_NC).float()
    loss = (cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    if z_loss == 0.0:
        return loss, torch.zeros_like(loss)
    return loss, z_loss * (logits_NV.logsumexp(-1).square() * weights_N).sum()
