"""What the tests of sigmoid attention share: cases, their inputs, and the comparison with the definition.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.sigmoid_attention import sigmoid_attention_reference

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    queries: int = 37
    keys: int = 37
    heads: int = 4
    key_heads: int = 4
    width: int = 8
    causal: bool = True
    window: int | tuple[int | None, int | None] | None = None
    alibi: Literal["none", "constant", "trained"] = "none"
    trained_bias: bool = False
    segments: bool = False
    offset: int | None = None


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    keys = (case.batch, case.keys, case.key_heads, case.width)
    shapes = [(case.batch, case.queries, case.heads, case.width), keys, keys]
    return [draw(seed + n, *shape).to(dtype).requires_grad_() for n, shape in enumerate(shapes)]


def segment_ids(batch: int, length: int, seed: int) -> Tensor:
    changes = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 3 / length + 0.02
    return changes.long().cumsum(1)


def options(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Keyword arguments of the case. Per-head tensors are fp32 or wider, as parameters are."""
    dtype = torch.promote_types(dtype, torch.float32)
    bias: float | Tensor = -math.log(case.keys)
    if case.trained_bias:
        bias = (bias + 0.3 * draw(seed + 3, case.heads)).to(dtype).requires_grad_()
    slopes = None
    if case.alibi != "none":
        slopes = draw(seed + 4, case.heads).abs().mul(0.2).to(dtype).requires_grad_(case.alibi == "trained")
    chosen: dict[str, Any] = {
        "bias": bias,
        "causal": case.causal,
        "alibi_slopes": slopes,
        "window": case.window,
    }
    if case.segments:
        chosen["segment_ids"] = segment_ids(case.batch, case.queries, seed)
        if case.keys != case.queries or case.offset not in (None, 0):
            chosen["key_segment_ids"] = segment_ids(case.batch, case.keys, seed + 1)
    if case.offset is not None:
        chosen["query_offset"] = case.offset
    return chosen


def results(attention: Attention, tensors: list[Tensor], **chosen: Any) -> list[Tensor]:
    """Output, then the gradients of q, k, v and of whichever of bias and slopes is trained."""
    out = attention(*tensors, **chosen)
    trained = [
        x for x in (chosen["bias"], chosen.get("alibi_slopes")) if isinstance(x, Tensor) and x.requires_grad
    ]
    gradient = draw(9, *out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [*tensors, *trained], gradient)]


def relative_errors(attention: Attention, case: Case, dtype: torch.dtype, seed: int = 0) -> list[float]:
    """Of each result against the float64 definition on the same rounded inputs, by norms."""
    tensors = inputs(case, seed, dtype)
    actual = results(attention, tensors, **options(case, seed, dtype))
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    right = results(sigmoid_attention_reference, doubles, **options(case, seed))
    # A result that is 0 by the definition must be 0: a tiny number instead of its norm shows any other.
    return [((a.double() - b).norm() / (b.norm() + 1e-30)).item() for a, b in zip(actual, right, strict=True)]


def excess(attention: Attention, case: Case, floor: float, seed: int = 0) -> float:
    """The largest error in float32, in units of what is allowed: 1 and below is right.

    Allowed is `floor`, or four times what the definition itself is off in float32: the gradients of bias and
    slopes are sums over all pairs, and how much of them cancels differs from case to case (as the order in
    which a matrix product adds differs from processor to processor).
    """
    ours = relative_errors(attention, case, torch.float32, seed)
    plain = relative_errors(sigmoid_attention_reference, case, torch.float32, seed)
    return max(error / max(floor, 4 * usual) for error, usual in zip(ours, plain, strict=True))


def cases() -> st.SearchStrategy[Case]:
    """Any small shape with any masks; T above S, windows and offsets that hide whole rows among them."""
    side = st.one_of(st.none(), st.integers(0, 12))
    windows = st.one_of(st.none(), st.integers(0, 30), st.tuples(side, side))
    return st.builds(
        lambda key_heads, group, **rest: Case(key_heads=key_heads, heads=key_heads * group, **rest),
        key_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        batch=st.integers(1, 2),
        queries=st.integers(1, 40),
        keys=st.integers(1, 60),
        width=st.sampled_from([1, 4, 17]),
        causal=st.booleans(),
        window=windows,
        alibi=st.sampled_from(["none", "constant", "trained"]),
        trained_bias=st.booleans(),
        segments=st.booleans(),
        offset=st.one_of(st.none(), st.integers(-30, 30)),
    )


@dataclass(frozen=True)
class GridCase:
    """One case of the grid on which the authors of FlashSigmoid test their CUDA kernel.

    Source: test_flash_attn_output of github.com/apple/ml-sigmoid-attention. `packed` (keys and values as one
    tensor) and `deterministic` are options of its interface; here k and v are then views of one tensor, and
    every result is deterministic.
    """

    biased: bool
    packed: bool
    dtype: torch.dtype
    heads: Literal["mha", "mqa", "gqa"]
    deterministic: bool
    alibi: bool
    local: bool
    causal: bool
    width: int
    lengths: tuple[int, int]


GRID_WIDTHS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
GRID_LENGTHS = (
    *((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024)),
    *((1024, 1023), (2048, 2048)),
)
KEY_HEADS = {"mha": 9, "mqa": 1, "gqa": 3}


def grid(widths: tuple[int, ...], lengths: tuple[tuple[int, int], ...]) -> Iterator[GridCase]:
    """The grid's cases of these head widths and lengths; 42,240 of all."""
    flags = (False, True)
    axes: tuple[Iterable[Any], ...] = (
        flags,
        flags,
        (torch.float16, torch.bfloat16),
        KEY_HEADS,
        flags,
        flags,
        flags,
        flags,
    )
    for chosen in product(*axes, widths, lengths):
        yield GridCase(*chosen)


def grid_errors(attention: Attention, case: GridCase, batch: int, device: str = "cpu") -> list[float]:
    """Our greatest absolute error over that of the definition computed in the case's dtype, per result.

    The authors accept 2. Results are the output and the gradients of q, k and v.
    """
    generator = torch.Generator().manual_seed(0)
    (queries, keys), key_heads = case.lengths, KEY_HEADS[case.heads]
    kv = torch.randn(batch, keys, 2, key_heads, case.width, generator=generator).to(device, case.dtype)
    q = torch.randn(batch, queries, 9, case.width, generator=generator).to(device, case.dtype)
    k, v = kv.unbind(2) if case.packed else (x.contiguous() for x in kv.unbind(2))
    left, right = torch.randint(0, keys, (2,), generator=generator).tolist()
    chosen: dict[str, Any] = {
        "bias": float(torch.rand(1, generator=generator) * 12 - 10) if case.biased else 0.0,
        "causal": case.causal,
        "window": (left, right) if case.local else None,
        "alibi_slopes": torch.rand(9, generator=generator).mul(0.3).to(device) if case.alibi else None,
    }
    gradient = torch.randn(q.shape, generator=generator).to(device, case.dtype)

    def run(function: Attention, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*tensors, **chosen)
        return [out, *torch.autograd.grad(out, tensors, gradient.to(dtype))]

    right_ones = run(sigmoid_attention_reference, torch.float32)
    plain, ours = run(sigmoid_attention_reference, case.dtype), run(attention, case.dtype)
    return [
        float((a.float() - r).abs().max() / ((p.float() - r).abs().max() + 1e-5))
        for a, p, r in zip(ours, plain, right_ones, strict=True)
    ]
