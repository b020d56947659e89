"""Compiles the kernels for Hopper without a GPU, as they are launched: what tests and tuning look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels.offline import Resources, compile_offline
from kernels.sigmoid_attention.tiles import EDGES, HALF, SINGLE, WIDTHS, Kernel, Tile
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
) -> Resources:
    """Compile one kernel at a padded head width. Whatever does not compile raises what the compiler raises."""
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
    return compile_offline(
        function,
        types={name: _type(kernel, name, width, tile, dtype, bulk) for name in names if name not in choices},
        constants={name: choices[name] for name in names if name in choices},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(name for name in names if "stride" in name or name == "width"),
    )


def shipped() -> Iterator[tuple[Kernel, int, torch.dtype, Tile, bool]]:
    """Every entry of the tables: kernel, width, dtype, tile, and whether it serves masks with edges."""
    for kernel in KERNELS:
        for width in WIDTHS:
            edges = EDGES.get((kernel, width))
            yield kernel, width, torch.bfloat16, HALF[kernel][width], edges is None
            if edges is not None:
                yield kernel, width, torch.bfloat16, edges, True
            if width in SINGLE[kernel]:
                yield kernel, width, torch.float32, SINGLE[kernel][width], True


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
