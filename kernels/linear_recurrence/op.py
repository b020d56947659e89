"""The public linear recurrence: a torch custom op with its gradient, which picks the form by device.

Shape suffixes: B batch, T time, D channels.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.devices import runs_triton
from kernels.linear_recurrence.chunked import chunked_linear_recurrence
from kernels.linear_recurrence.reference import apply, transpose
from kernels.ops import operator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """One program: `window` positions by `channels`."""

    window: int
    channels: int
    warps: int


# Keyed by whether factors are 2x2 blocks. Chosen without a GPU: no spills, 16 or fewer elements per thread.
TILES = {False: Tile(128, 16, 4), True: Tile(64, 16, 4)}


def linear_recurrence(a: Tensor, b: Tensor, state: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """y_t = a_t y_{t-1} + b_t from y_{-1} = state; with `reverse`, y_t = a_t y_{t+1} + b_t from y_T = state.

    Args:
        a: (B, T, D), one factor per channel, or (B, T, 2, 2, D), a 2x2 matrix per channel as row, column,
            channel. fp64, fp32, bf16 or fp16.
        b: (B, T, D), or (B, T, 2, D) for matrices; a's dtype and device.
        state: (B, D) or (B, 2, D); zeros if None.
        reverse: from the end to the beginning.

    Returns y, shaped as b, in its dtype; computed in fp32 or wider. Gradients flow to all three. Raises
    ValueError naming the argument and what it may be.
    """
    _check(a, b, state)
    if state is None:
        state = b.new_zeros(b.shape[:1] + b.shape[2:])
    y: Tensor = _recur(a, b, state.to(b.dtype), reverse)
    return y


@operator("triptych::linear_recurrence")
def _recur(a: Tensor, b: Tensor, state: Tensor, reverse: bool) -> Tensor:
    a, b, state = a.contiguous(), b.contiguous(), state.contiguous()
    if b.dtype != torch.float64 and runs_triton(b):
        return _launch(a, b, state, reverse)
    wide = torch.promote_types(b.dtype, torch.float32)
    y = chunked_linear_recurrence(a.to(wide), b.to(wide), state.to(wide), reverse=reverse)
    return y.to(b.dtype).clone(memory_format=torch.contiguous_format)


@_recur.register_fake
def _(a: Tensor, b: Tensor, state: Tensor, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


def _launch(a: Tensor, b: Tensor, state: Tensor, reverse: bool) -> Tensor:
    from kernels.linear_recurrence import triton_scan

    block = a.dim() != b.dim()
    rows, time, width = b.shape[0], b.shape[1], b.shape[-1]
    tile = TILES[block]
    y = torch.empty_like(b)
    kernel = triton_scan.block_kernel if block else triton_scan.diagonal_kernel
    on_device = torch.cuda.device(b.device) if b.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(-(-width // tile.channels), rows)](
            a,
            b,
            state,
            y,
            time,
            width,
            W=tile.window,
            C=tile.channels,
            REVERSE=reverse,
            num_warps=tile.warps,
        )
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, state, reverse = inputs
    ctx.save_for_backward(a, state, output)
    ctx.reverse = reverse


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The total gradient of y runs the recurrence the other way, with the factors transposed and shifted."""
    a, state, y = ctx.saved_tensors
    block, reverse = a.dim() != y.dim(), ctx.reverse
    transposed = transpose(a, block=block)
    zero = torch.zeros_like(transposed[:, :1])
    if reverse:
        following = torch.cat([zero, transposed[:, :-1]], 1)
        previous = torch.cat([y[:, 1:], state[:, None]], 1)
    else:
        following = torch.cat([transposed[:, 1:], zero], 1)
        previous = torch.cat([state[:, None], y[:, :-1]], 1)
    total = _recur(following, grad, torch.zeros_like(state), not reverse)
    first = -1 if reverse else 0
    grad_state = apply(transposed[:, first], total[:, first])
    grad_a = total.unsqueeze(-2) * previous.unsqueeze(-3) if block else total * previous
    return grad_a, total, grad_state, None


_recur.register_autograd(_differentiate, setup_context=_setup_context)


def _check(a: Tensor, b: Tensor, state: Tensor | None) -> None:
    if b.dim() not in (3, 4) or (b.dim() == 4 and b.shape[2] != 2):
        raise ValueError(
            f"b must be (batch, time, channels) or (batch, time, 2, channels), got shape {tuple(b.shape)}"
        )
    if b.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"b must be one of {names}, got {b.dtype}")
    if 0 in b.shape:
        raise ValueError(f"b has a size of 0 (a sequence of length 0?): its shape is {tuple(b.shape)}")
    shape = b.shape if b.dim() == 3 else (*b.shape[:2], 2, 2, b.shape[3])
    if a.shape != shape:
        raise ValueError(f"a must be {tuple(shape)}, by b; got {tuple(a.shape)}")
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"a must share b's dtype and device ({b.dtype}, {b.device}), got {a.dtype}, {a.device}"
        )
    expected = b.shape[:1] + b.shape[2:]
    if state is not None and (state.shape != expected or state.device != b.device):
        raise ValueError(
            f"state must be {tuple(expected)} on {b.device}, by b; got {tuple(state.shape)} on {state.device}"
        )
