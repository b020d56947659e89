"""Hidden states to logits, or straight to cross-entropies.

Shape suffixes: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from models.layers.linear import Linear


class Head(Linear):
    """`hidden weight^T`. A head whose vocabulary is divided over ranks has `columns`, `whole` and `losses` of its own.

    Call it as a module, so that hooks on it run: under ZeRO 3 its weight is here during the call alone.
    """

    group = "head"

    @property
    def columns(self) -> int:
        """Logits per token that exist at once where the loss is computed."""
        return self.out_features

    def forward(
        self,
        hidden: Tensor,
        targets_N: Tensor | None = None,
        *,
        size: int | None = None,
        normalisers: bool = False,
    ) -> Any:
        """Logits (..., V) of hidden states (..., C); with targets, the losses of hidden states (N, C).

        Args:
            targets_N: token ids below `size`.
            size: only ids below it can be predicted; None: all.
            normalisers: whether to give the logits' log-sum-exp too.

        Returns:
            Logits, in the weight's dtype; with targets, the cross-entropies in nats (N,) fp32, and the log-sum-exps
            (N,) fp32 or None.
        """
        logits = super().forward(hidden)
        if targets_N is None:
            return self.whole(logits)
        return self.losses(logits, targets_N, size, normalisers)

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of all ids."""
        return logits

    def losses(
        self, logits_NV: Tensor, targets_N: Tensor, size: int | None, normalisers: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide_NV = logits_NV[:, :size].float()
        each_N = cross_entropy(wide_NV, targets_N, reduction="none")
        return each_N, wide_NV.logsumexp(-1) if normalisers else None
