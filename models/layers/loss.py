"""Cross-entropy from hidden states, without keeping the logits of a whole batch.

Shape suffixes: B batch, T time, N tokens (B T, or some of them), C model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.layers.head import Head

# 256 MiB of fp32: a demo's batch is one chunk; of a vocabulary of 32,768 a chunk has 2,048 tokens.
LOGITS_PER_CHUNK = 2**26


def default_chunk_tokens(columns: int) -> int:
    """Tokens whose logits are made at once, of a head with so many `columns`."""
    return max(1, LOGITS_PER_CHUNK // columns)


def token_cross_entropy(
    head: Head,
    hidden_BTC: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' cross-entropies in nats, and the z term: two fp32 scalars.

    Args:
        targets_BT: token ids. A wrong target of a token with weight 0 is never looked at, if it is a valid token.
        z_loss: the z term is z_loss times the weighted sum of logsumexp(logits)^2 (Chowdhery et al., "PaLM");
            it is returned apart, so that the reported loss stays pure. 0 costs nothing.
        chunk_tokens: with more tokens than this, logits are made and dropped chunk by chunk and made again
            in the backward pass. `default_chunk_tokens(head.columns)` is a good value.
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
    head: Head,
    hidden_NC: Tensor,
    targets_N: Tensor,
    *,
    size: int | None = None,
    chunk_tokens: int,
    positions: int | None = None,
) -> Tensor:
    """The cross-entropy of every token in nats, (N,) fp32; N may be 0.

    Args:
        size: only ids below it can be predicted; None: all.
        chunk_tokens: as in `token_cross_entropy`.
        positions: so many there are, of which these tokens are some. The number of chunks follows from it, and not
            from N: ranks under ZeRO 3, whose N differ, must call the head equally often. None: N.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if hidden_NC.shape[:1] != targets_N.shape:
        raise ValueError(
            f"targets_N {tuple(targets_N.shape)} must have one target per row of hidden_NC {tuple(hidden_NC.shape)}"
        )
    count = -(-(hidden_NC.shape[0] if positions is None else positions) // chunk_tokens)
    if count <= 1:
        return _each_of_chunk(head, hidden_NC, targets_N, size)
    chunks = zip(hidden_NC.tensor_split(count), targets_N.tensor_split(count), strict=True)
    return torch.cat(
        [
            checkpoint(
                _each_of_chunk, head, hidden, targets, size, use_reentrant=False, preserve_rng_state=False
            )
            for hidden, targets in chunks
        ]
    )


def _each_of_chunk(head: Head, hidden_NC: Tensor, targets_N: Tensor, size: int | None) -> Tensor:
    each_N: Tensor = head(hidden_NC, targets_N, size=size)[0]
    return each_N


def _chunk_loss(
    head: Head, hidden_NC: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    each_N, normalisers_N = head(hidden_NC, targets_N, normalisers=z_loss != 0.0)
    loss = (each_N * weights_N).sum()
    if z_loss == 0.0:
        return loss, torch.zeros_like(loss)
    return loss, z_loss * (normalisers_N.square() * weights_N).sum()
