"""Linear recurrences whose right answer is known to the last bit, or whose states keep their length.

Shape suffixes: B batch, T time, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference


def integers(time: int, *, block: bool, seed: int = 0, width: int = 3) -> list[Tensor]:
    """a, b, state: signs, or signed permutations of two numbers; integer inputs. Two rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high, sizes, generator=generator).float()

    sizes = (2, time, 2, width) if block else (2, time, width)
    b, state = draw(-3, 4, *sizes), draw(-3, 4, 2, *sizes[2:])
    if not block:
        return [2 * draw(0, 2, *sizes) - 1, b, state]
    swap = draw(0, 2, 2, time, width)
    rows = torch.stack([torch.stack([1 - swap, swap], 2), torch.stack([swap, 1 - swap], 2)], 2)
    signs = 2 * draw(0, 2, 2, time, 2, 1, width) - 1
    return [rows * signs, b, state]


def rotations(time: int, seed: int = 0, width: int = 3) -> list[Tensor]:
    """a, b, state: rotations by random angles, which neither grow nor shrink what they turn; b is small."""
    generator = torch.Generator().manual_seed(seed)
    angle = 6.283185 * torch.rand(2, time, width, generator=generator)
    cosine, sine = angle.cos(), angle.sin()
    a = torch.stack([torch.stack([cosine, -sine], 2), torch.stack([sine, cosine], 2)], 2)
    b = 0.01 * torch.randn(2, time, 2, width, generator=generator)
    return [a, b, torch.randn(2, 2, width, generator=generator)]


def assert_bit_equal(time: int, *, block: bool, reverse: bool, seed: int = 0) -> None:
    a, b, state = integers(time, block=block, seed=seed)
    expected = linear_recurrence_reference(a, b, state, reverse=reverse)
    assert torch.equal(linear_recurrence(a, b, state, reverse=reverse), expected), f"length {time}"
