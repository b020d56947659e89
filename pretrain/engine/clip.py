"""Gradient clipping for the engine that leaves it to us (ZeRO 0)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Axis


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float | None, tensor: Axis) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns () the norm before.

    DeepSpeed's own form walks the parameters one by one and does not report the norm. Nothing here waits for
    the device. Every parameter must be a part or a copy, as `mark_parameters` marks it, along the tensor axis alone
    (ZeRO 0).
    """
    parts: list[Tensor] = []
    copies: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            is_part = getattr(parameter, "tensor_model_parallel", False)
            (parts if is_part else copies).append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(copies, foreach=True)
    if tensor.size > 1:
        square = torch.nn.utils.get_total_norm(parts, foreach=True).square()
        dist.all_reduce(square, group=tensor.group)
        norm = (square + norm.square()).sqrt()
    if max_norm is not None:
        torch._foreach_mul_([*parts, *copies], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
