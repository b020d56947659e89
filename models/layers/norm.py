"""RMS norm over the last axis. Shape suffixes: C the normalised width, N all other axes flattened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from models.initialise import Constant, Rule
from models.sharding import Part


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight`, inside in fp32 or wider, returned in x's dtype."""

    group = "norm"

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def initial_rules(self) -> dict[str, Rule]:
        return {"weight": Constant(1.0)}

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            out: Tensor = _EagerRMSNorm.apply(x, self.weight, self.epsilon, None)
            return out
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(x * silu(gate))` of each of `groups` equal runs of channels by itself.

    Source: Dao and Gu, "Transformers are SSMs" (Mamba-2), and their code's `RMSNorm` with `group_size`.
    As a part it holds some of the channels: whole groups, or a piece of one, whose mean square is still that of all
    of the group.
    """

    def __init__(self, width: int, epsilon: float, groups: int = 1) -> None:
        super().__init__(width, epsilon)
        self.groups = groups
        self.part: GroupPart | None = None

    def take_part(self, part: Part) -> None:
        if self.groups % part.of == 0:
            self.groups //= part.of
            return
        assert part.of % self.groups == 0, f"{part.of} parts of {self.groups} groups"
        self.part, self.groups = GroupPart(part, self.groups), 1

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]  # takes a gate too
        """(..., C) and (..., C) to (..., C)."""
        gated = x * functional.silu(gate)
        if self.part is not None:
            out: Tensor = _EagerRMSNorm.apply(gated, self.weight, self.epsilon, self.part)
            return out
        if self.groups == 1:
            return super().forward(gated)
        wide = gated.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        normed = functional.rms_norm(wide, wide.shape[-1:], None, self.epsilon)
        return (normed.flatten(-2) * self.weight).to(x.dtype)


@dataclass(frozen=True)
class GroupPart:
    """A piece of one of several groups of channels, which equally many parts share each.

    groups: of all parts together.
    """

    part: Part
    groups: int

    @property
    def of(self) -> int:
        """Pieces of the group."""
        return self.part.of // self.groups

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over the pieces of the own group. All parts sum together, each group in a place of its own."""
        if self.groups == 1:
            return self.part.add_up(x)
        own = self.part.number // self.of
        places = x.new_zeros((self.groups, *x.shape))
        places[own] = x
        return self.part.add_up(places)[own]


class _EagerRMSNorm(torch.autograd.Function):
    """With its gradient written by hand: on a CPU torch's own is a chain of some ten operations.

    With r = 1 / sqrt(mean(x^2) + epsilon): dw = sum_N r g x, dx = r g w - r^3 x sum_C(g w x) / C.
    Kept for the backward pass are x and r. Of a `part`, both sums over C go over the other parts too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, part: GroupPart | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        ctx.part, ctx.channels = part, x.shape[-1] * (1 if part is None else part.of)
        square = norm.square_() if part is None else part.add_up(norm.square_())
        inverse = square.div_(ctx.channels).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide_grad, wide_weight = grad.to(inverse.dtype), weight.to(inverse.dtype)
        product_NC = (wide_grad * x).reshape(-1, x.shape[-1])
        weight_grad = inverse.view(1, -1).mm(product_NC).view(-1)
        along = product_NC.mv(wide_weight).view(inverse.shape)
        if ctx.part is not None:
            along = ctx.part.add_up(along)
        x_grad = (wide_grad * wide_weight).mul_(inverse)
        x_grad.addcmul_(x.to(inverse.dtype), along.mul_(inverse.pow(3)), value=-1 / ctx.channels)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None
