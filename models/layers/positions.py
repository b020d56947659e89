"""Positions: ALiBi slopes and rotary embedding.

Shape suffixes: B batch, T time, H heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int, *, device: torch.device | None = None) -> Tensor:
    """(H,) fp32 slopes: 2^(-8 i / H), i = 1 ... H, with every other one of the next finer sequence added
    where H is no power of two. Computed on the device: a copied list would make the host wait.

    Source: Press et al., "Train Short, Test Long", and its authors' code.
    """
    below = 2 ** math.floor(math.log2(heads))
    regular = torch.arange(1, below + 1, device=device, dtype=torch.float32) * (-8 / below)
    if below == heads:
        return torch.exp2(regular)
    finer = torch.arange(1, 2 * (heads - below), 2, device=device, dtype=torch.float32) * (-4 / below)
    return torch.exp2(torch.cat((regular, finer)))


def rotary_table(positions_BT: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (B, T, 1, D / 2) in fp32, of the angles position * base^(-2 i / D).

    positions_BT: (B, T); or (B, T, 2), a position on each of two axes: the frequencies of even i turn with the
        first axis and those of odd i with the second, so that both axes have low and high ones, and a token
        whose two positions are equal is embedded exactly as in one dimension.
    """
    frequencies = base ** (
        -torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
    )
    if positions_BT.ndim == 3:
        # Repeated and cut, for D / 2 may be odd; no gather, so the same code compiles for one axis and two.
        pairs = positions_BT.float().repeat(1, 1, (len(frequencies) + 1) // 2)[:, :, : len(frequencies)]
        angles = pairs[:, :, None] * frequencies
    else:
        angles = positions_BT[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding: the first and second half of the head width are a pair's two coordinates.

    Source: Su et al., "RoFormer", in the half-split form of GPT-NeoX and Llama.
    """
    cosine, sine = table
    first, second = x_BTHD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(x_BTHD.dtype)


def row_positions(tokens_BT: Tensor, start: int = 0) -> Tensor:
    """Positions start, start + 1, ... of every row, (B, T)."""
    batch, time = tokens_BT.shape[:2]
    return torch.arange(start, start + time, device=tokens_BT.device).expand(batch, time)
