"""Sigmoid attention as a layer. Shape suffixes: B batch, T time, S key time, H, K heads, D head width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kernels.sigmoid_attention import sigmoid_attention
from models.declared import Crossing
from models.layers.attention import Attention, AttentionShape


class SigmoidAttention(Attention):
    """`sigmoid(q k^T / sqrt(D) - slope |i - j| + bias) v` between the projections."""

    crossing = Crossing("attend", ("gather",))  # what ranges of keys contribute adds up

    def __init__(self, shape: AttentionShape, bias: float) -> None:
        super().__init__(shape)
        self.bias = bias

    def attend(
        self,
        q_BTHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        segment_ids_BT: Tensor | None,
        slopes_H: Tensor | None,
    ) -> Tensor:
        """Sigmoid attention of the last T of S positions, (B, T, H, D)."""
        return sigmoid_attention(
            q_BTHD,
            k_BSKD,
            v_BSKD,
            bias=self.bias,
            causal=self.shape.causal,
            alibi_slopes=slopes_H,
            segment_ids=segment_ids_BT,
        )


def sigmoid_mixer(bias: float | None) -> Callable[[AttentionShape], SigmoidAttention]:
    """The layer of a resolved config's bias. Raises ValueError for one that is still open."""
    if bias is None:
        raise ValueError("attention_bias must be known to build the model: use config.resolved(...)")
    return partial(SigmoidAttention, bias=bias)
