"""Gradient clipping for the engine that leaves it to us (ZeRO 0)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns () the norm before.

    DeepSpeed's own form walks the parameters one by one and does not report the norm. Nothing here waits for
    the device. Every parameter must be whole on this rank (tensor size 1, ZeRO 0).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
