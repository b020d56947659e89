"""Compiles the kernels for Hopper without a GPU, as they are launched: what tests and tuning look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels.offline import Resources, compile_offline
from kernels.sigmoid_attention.tiles import (
    DECODE_ROWS,
    EDGES,
    HALF,
    SINGLE,
    WIDTHS,
    Kernel,
    Tile,
    decode_tile,
)
from kernels.sigmoid_attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from kernels.sigmoid_attention.triton_decode import decode_kernel
from kernels.sigmoid_attention.triton_forward import forward_kernel

KERNELS: dict[Kernel, Any] = {
    "forward": forward_kernel,
    "query gradient": query_gradient_kernel,
    "key gradient": key_gradient_kernel,
    "decode": decode_kernel,
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BULK = {
    "Q": "rows",
    "GRAD": "rows",
    "K": "keys",
    "V": "keys",
}  # read by bulk copies, in blocks of so many rows
OWN = {"forward": ("Q",), "query gradient": ("Q", "GRAD"), "key gradient": ("K", "V"), "decode": ()}


@dataclass(frozen=True)
class Masks:
    """What a kernel is compiled for beside its tile."""

    left: bool = False
    right: bool = True
    segments: bool = False
    alibi: bool = False
    per_head: bool = False  # a bias per head, and in the query gradient the gradients of bias and slopes

    def __str__(self) -> str:
        names = {
            "left window": self.left,
            "causal": self.right,
            "packed": self.segments,
            "ALiBi": self.alibi,
            "trained bias": self.per_head,
        }
        return " + ".join(name for name, on in names.items() if on) or "full"


FULL_MASK = Masks(right=False)
NO_EDGES = Masks(right=False, per_head=True)
CAUSAL = Masks()
PACKED = Masks(segments=True)
EVERYTHING = Masks(left=True, segments=True, alibi=True, per_head=True)


def compile_tile(
    kernel: Kernel,
    width: int,
    tile: Tile,
    *,
    dtype: torch.dtype = torch.bfloat16,
    masks: Masks = CAUSAL,
    bulk: bool = True,
    part: str = "both",
    sizes_of_one: bool = False,
) -> Resources:
    """Compile one kernel at a padded head width. Whatever does not compile raises what the compiler raises.

    sizes_of_one: every size, offset and window is 1, which a launch makes a constant.
    """
    function = KERNELS[kernel]
    bulk = bulk and kernel != "decode"
    choices = {
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "WIDTH": width,
        "LEFT": masks.left,
        "RIGHT": masks.right,
        "SEGMENTS": masks.segments,
        "ALIBI": masks.alibi,
        "HEAD_BIAS": masks.per_head,
        "BIAS_GRADIENT": masks.per_head,
        "SLOPE_GRADIENT": masks.per_head and masks.alibi,
        "POLYNOMIAL": tile.polynomial,
        "BULK": bulk,
        "OWN_BULK": bulk and not tile.own_shared,
        "PRECISION": "tf32",
        "KEY_PART": part != "value",
        "VALUE_PART": part != "key",
    }
    names = list(function.arg_names)
    if sizes_of_one:
        sizes = (name for name in names if name not in choices and "stride" not in name)
        choices.update((name, 1) for name in sizes if _type(kernel, name, width, tile, dtype, bulk) == "i32")
    return compile_offline(
        function,
        types={name: _type(kernel, name, width, tile, dtype, bulk) for name in names if name not in choices},
        constants={name: choices[name] for name in names if name in choices},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(
            name for name in names if ("stride" in name or name == "width") and name not in choices
        ),
    )


def shipped() -> Iterator[tuple[Kernel, int, torch.dtype, Tile, bool]]:
    """Every shape that is launched: kernel, width, dtype, tile, and whether it serves masks with edges."""
    for kernel in KERNELS:
        for width in WIDTHS:
            edges = EDGES.get((kernel, width))
            yield from _with_rows(kernel, width, torch.bfloat16, HALF[kernel][width], edges is None)
            if edges is not None:
                yield kernel, width, torch.bfloat16, edges, True
            if width in SINGLE[kernel]:
                yield from _with_rows(kernel, width, torch.float32, SINGLE[kernel][width], True)


def _with_rows(
    kernel: Kernel, width: int, dtype: torch.dtype, tile: Tile, edges: bool
) -> Iterator[tuple[Kernel, int, torch.dtype, Tile, bool]]:
    """An entry of the tables; a decode, with every number of rows."""
    tiles = [decode_tile(tile, rows) for rows in DECODE_ROWS] if kernel == "decode" else [tile]
    for each in tiles:
        yield kernel, width, dtype, each, edges


def parts(kernel: Kernel, tile: Tile) -> tuple[str, ...]:
    """The launches that a tile takes, as `part` of `compile_tile`."""
    return ("key", "value") if kernel == "key gradient" and tile.split else ("both",)


def _type(kernel: Kernel, name: str, width: int, tile: Tile, dtype: torch.dtype, bulk: bool) -> str:
    if bulk and name in BULK and not (tile.own_shared and name in OWN[kernel]):
        rows = getattr(tile, BULK[name])
        return f"tensordesc<{NAMES[dtype]}[1, {rows}, 1, {width}]>"
    if name in ("BIAS", "SLOPES", "DBIAS", "DSLOPES"):
        return "*fp32"
    if name in ("LOW", "HIGH"):
        return "*i32"
    if name in ("scale", "score_scale", "bias"):
        return "fp32"
    return f"*{NAMES[dtype]}" if name.isupper() else "i32"
