"""`nn.Linear` and `nn.Embedding` that leave their weights as allocated: `models.initialise` draws them."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """`x weight^T`, without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: drawing weights here would cost minutes at 7B and depend on the order of construction."""


class Embedding(nn.Embedding):
    """One row per token."""

    group = "embedding"

    def reset_parameters(self) -> None:
        """Nothing, as in `Linear`."""
