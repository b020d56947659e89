"""Complete(d)P: what a model wider and deeper than a tuned base changes, so that the base's settings stay right.

Source: Mlodozeniec et al., "Completed Hyperparameter Transfer across Modules, Width, Depth, Batch and Duration"
(arXiv:2512.22382), and for the epsilon of vectors Dey et al., "Don't be lazy: CompleteP" (arXiv:2505.01618).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The base model, at whose size the optimizer's settings were tuned.

    alpha: exponent of the depth in the residual branches, x + (layers / base)^-alpha f(x); 1 and 1/2 both transfer.
    """

    width: int
    layers: int
    alpha: float = 1.0


@dataclass(frozen=True)
class Multipliers:
    """Factors on a base model's initial deviation, learning rate and Adam epsilon, for one type of tensor."""

    deviation: float = 1.0
    lr: float = 1.0
    epsilon: float = 1.0


def multipliers(transfer: Transfer, width: int, layers: int) -> dict[str, Multipliers]:
    """By type: embedding, matrix (of a block), vector (of a block: gains and biases), qk_norm (gains that all heads
    share, so their gradients do not shrink with the width), final_norm (the gains after the blocks, which no depth
    reaches), head (an untied one)."""
    m_width, m_depth, alpha = width / transfer.width, layers / transfer.layers, transfer.alpha
    block_lr, branch = m_depth ** (alpha - 1), m_depth**-alpha
    return {
        "embedding": Multipliers(epsilon=1 / m_width),
        "matrix": Multipliers(m_width**-0.5, block_lr / m_width, branch / m_width),
        "vector": Multipliers(lr=block_lr, epsilon=branch / m_width),
        "qk_norm": Multipliers(lr=block_lr, epsilon=branch),
        "final_norm": Multipliers(epsilon=1 / m_width),
        # Without a factor on the logits, so that fused cross-entropies work: it is in the deviation and the rate.
        "head": Multipliers(1 / m_width, 1 / m_width),
    }


def residual_factor(transfer: Transfer | None, layers: int) -> float:
    """What a branch is multiplied by before it joins the residual stream."""
    return 1.0 if transfer is None else float((layers / transfer.layers) ** -transfer.alpha)
