"""The interpreter's bfloat16 against torch's: without the correction these sums are silently wrong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _products(A, B, SUM, PRODUCT, COMPARED, N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads these
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(A + i * N + j), tl.load(B + i * N + j)
    tl.store(SUM + i * N + j, a + b)
    tl.store(PRODUCT + i * N + j, tl.dot(a, b).to(tl.bfloat16))
    tl.store(COMPARED + i * N + j, tl.where(a > b, a, b))


def test_arithmetic_rounds_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    outs: list[Tensor] = [torch.empty_like(a) for _ in range(3)]
    _products[(1,)](a, b, *outs, N=16)
    torch.testing.assert_close(outs[0], a + b, rtol=0, atol=0)
    torch.testing.assert_close(outs[1], (a.float() @ b.float()).bfloat16(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(outs[2], torch.maximum(a, b), rtol=0, atol=0)
