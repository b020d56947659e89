"""The short causal convolution of recurrent blocks. Shape suffixes: B batch, T time, C channels, W taps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.declared import Crossing
from models.initialise import Constant, Rule, Uniform


class CausalConv(nn.Module):
    """`y_t = bias + sum_w weight_w x_{t - W + 1 + w}` per channel, over inputs of t's own document alone.

    `weight` is (C, W) with the present input's tap last, as in `nn.Conv1d`.
    """

    crossing = Crossing("forward", ("halo",))

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def initial_rules(self) -> dict[str, Rule]:
        return {"weight": Uniform(self.taps**-0.5), "bias": Constant(0.0)}

    def forward(
        self, x_BTC: Tensor, segment_ids_BT: Tensor | None, before_BWC: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) to (B, T, C).

        segment_ids_BT: (B, T); or (B, W - 1 + T), with those of the inputs before.
        before_BWC: the W - 1 inputs before the first; zeros if None. Without ids they are of its document.
        """
        padded = pad_before(x_BTC, before_BWC, self.taps - 1)
        visible = None if segment_ids_BT is None else same_document(segment_ids_BT, self.taps - 1)
        if visible is not None:
            visible = visible[:, :, visible.shape[2] - x_BTC.shape[1] :]
        out: Tensor = _Convolution.apply(padded, self.weight, self.bias, visible)
        return out


def pad_before(x_BTC: Tensor, before_BWC: Tensor | None, count: int) -> Tensor:
    """The inputs with `count` earlier ones in front, (B, count + T, C)."""
    if before_BWC is None:
        before_BWC = x_BTC.new_zeros(x_BTC.shape[0], count, x_BTC.shape[2])
    return torch.cat((before_BWC.to(x_BTC.dtype), x_BTC), dim=1)


def same_document(segment_ids_BT: Tensor, reach: int) -> Tensor:
    """(reach, B, T, 1) bool: whether no document began in the `lag` positions up to t, lag 1 ... reach.

    What lies before position 0 counts as of position 0's document.
    """
    begins_BT = torch.zeros_like(segment_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    cut, found = torch.zeros_like(begins_BT), []
    for lag in range(1, reach + 1):
        cut = cut | torch.nn.functional.pad(begins_BT, (lag - 1, 0))[:, : begins_BT.shape[1]]
        found.append(~cut)
    return torch.stack(found)[..., None] if found else begins_BT.new_zeros(0, *begins_BT.shape, 1)


def last_inputs(
    x_BTC: Tensor, segment_ids_BT: Tensor | None, before_BWC: Tensor | None, count: int
) -> Tensor:
    """What the convolution must remember: the last `count` inputs, zeros for those of an earlier document."""
    last = pad_before(x_BTC, before_BWC, count)[:, -count:] if count else x_BTC[:, :0]
    if segment_ids_BT is None or not count:
        return last.detach().clone()
    visible = same_document(segment_ids_BT, count)[:, :, -1, 0]  # (count, B): lag 1 joins the last two inputs
    kept_BW = torch.ones(last.shape[:2], dtype=torch.bool, device=last.device)
    for lag in range(1, count):
        kept_BW[:, count - 1 - lag] = visible[lag - 1]
    return last.detach() * kept_BW[..., None]


class _Convolution(torch.autograd.Function):
    """Shifted multiply-adds, and their gradient by hand: torch would keep every shifted and masked copy."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
        reach = weight.shape[1] - 1
        time = padded.shape[1] - reach
        ctx.save_for_backward(padded, weight, visible)
        dtype, wide = padded.dtype, _wide(padded)
        padded, weight = padded.to(wide), weight.to(wide)
        out = torch.addcmul(bias.to(wide), padded[:, reach:], weight[:, reach])
        for lag in range(1, reach + 1):
            shifted = padded[:, reach - lag : reach - lag + time]
            if visible is not None:
                shifted = shifted * visible[lag - 1]
            out.addcmul_(shifted, weight[:, reach - lag])
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded, weight, visible = ctx.saved_tensors
        reach, wide = weight.shape[1] - 1, _wide(grad)
        time = padded.shape[1] - reach
        x, taps, grad = padded.to(wide), weight.to(wide), grad.to(wide)
        grad_x, grad_taps = torch.zeros_like(x), []
        for tap in range(reach + 1):
            lag = reach - tap
            seen = grad if visible is None or lag == 0 else grad * visible[lag - 1]
            grad_x[:, tap : tap + time].addcmul_(seen, taps[:, tap])
            grad_taps.append((seen * x[:, tap : tap + time]).sum((0, 1)))
        grad_weight = torch.stack(grad_taps, 1).to(weight.dtype)
        return grad_x.to(padded.dtype), grad_weight, grad.sum((0, 1)).to(weight.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
