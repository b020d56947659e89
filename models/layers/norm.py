"""RMS norm over the last axis. Shape suffixes: C the normalised width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`, inside in fp32, returned in x's dtype."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if x.dtype in (torch.bfloat16, torch.float16):
            normed = functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon)
            return normed.to(x.dtype)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
