"""Block shapes of sigmoid attention: measured on a GPU, or compiled for Hopper without one.

Used by `python -m benchmarks.attention --tune` and `--offline`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cases import Case, document_ids, draw, flops, milliseconds
from kernels.offline import REGISTERS, SHARED_BYTES, Resources, complaints
from kernels.sigmoid_attention.offline import (
    CAUSAL,
    EVERYTHING,
    FULL_MASK,
    NO_EDGES,
    PACKED,
    Masks,
    compile_tile,
    parts,
    shipped,
)
from kernels.sigmoid_attention.problem import Problem, problem_of
from kernels.sigmoid_attention.tiles import Kernel, Tile, tile_for
from kernels.sigmoid_attention.triton_launch import (
    triton_forward,
    triton_key_gradient,
    triton_query_gradient,
)

TRAINING: tuple[Kernel, ...] = ("forward", "query gradient", "key gradient")
WIDTHS = (64, 128, 256)
RESIDENT_THREADS = 2048  # of one multiprocessor
SHAPES: dict[Kernel, tuple[tuple[int, int, int, int], ...]] = {  # rows, keys, warps, stages
    "forward": (
        *((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4)),
        *((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 4, 3)),
    ),
    "query gradient": (
        *((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2)),
        *((64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2)),
    ),
    "key gradient": (
        *((128, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3)),
    ),
}


def candidates(kernel: Kernel, width: int) -> Iterator[Tile]:
    """Shapes to try, each with either place of its own rows; the form of the sigmoid is tried on the best."""
    split = kernel == "key gradient" and width > 128
    for shape in SHAPES[kernel]:
        for own_shared in (False, True):
            yield Tile(*shape, own_shared=own_shared, split=split)


def tune(device: torch.device, quick: bool, repeats: int) -> dict[str, Any]:
    """Time every candidate that agrees with the table's tile; print the fastest as new table entries."""
    results = []
    for width in (64,) if quick else WIDTHS:
        for mask in ("full", "causal"):
            case = Case(mask, width, 100, 1, 2) if quick else Case(mask, width, 8192, 2, 2048 // width)
            for kernel in TRAINING:
                found = _tune_kernel(kernel, case, device, 2 if quick else None, repeats)
                best = min((x for x in found if "milliseconds" in x), key=lambda x: x["milliseconds"])
                results.extend(found)
                print(f"{kernel}, width {width}, {'no edges' if mask == 'full' else 'edges'}: {_entry(best)}")
    return {"tiles": results}


def _tune_kernel(
    kernel: Kernel, case: Case, device: torch.device, limit: int | None, repeats: int
) -> list[dict[str, Any]]:
    launch = _launcher(kernel, case, device)
    shipped_tile = tile_for(kernel, case.width, case.mask != "full", torch.bfloat16)
    right = launch(shipped_tile)
    shapes = [shipped_tile, *list(candidates(kernel, case.width))[:limit]]
    found = [_time(launch, tile, right, case, device, repeats) for tile in shapes]
    timed = [x for x in found if "milliseconds" in x]
    best = min(timed, key=lambda x: x["milliseconds"])["tile"]
    other_form = replace(Tile(**best), polynomial=not best["polynomial"])
    found.append(_time(launch, other_form, right, case, device, repeats))
    return [{"kernel": kernel, "mask": case.mask, "width": case.width, **x} for x in found]


def _launcher(kernel: Kernel, case: Case, device: torch.device) -> Callable[[Tile], list[Tensor]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # which the interpreter knows
    (q, k, v), grad = draw(case, device, dtype)
    q, k, v = q.detach(), k.detach(), v.detach()
    band = (-1, -1 if case.mask == "full" else 0, 0)
    ids = document_ids(case, device) if case.mask == "packed" else None
    constants = (-math.log(case.time), case.width**-0.5)
    problem: Problem = problem_of(q, k, constants, band, segments=(ids, ids))
    if kernel == "forward":
        return lambda tile: [triton_forward(q, k, v, problem, dtype, tile)]
    if kernel == "query gradient":
        return lambda tile: [triton_query_gradient(grad, q, k, v, problem, tile=tile)[0]]
    return lambda tile: list(triton_key_gradient(grad, q, k, v, problem, tile))


def _time(
    launch: Callable[[Tile], list[Tensor]],
    tile: Tile,
    right: list[Tensor],
    case: Case,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    try:
        errors = [_distance(a, b) for a, b in zip(launch(tile), right, strict=True)]
        if not max(errors) < 1e-2:
            return {"tile": asdict(tile), "wrong": max(errors)}
        taken = milliseconds(partial(launch, tile), device, repeats)
    except Exception as error:  # what a compiler raises for a shape it cannot take has no common type
        return {"tile": asdict(tile), "failed": f"{type(error).__name__}: {str(error)[:120]}"}
    return {
        "tile": asdict(tile),
        "milliseconds": taken,
        "forward_tflops": flops(case)["forward"] / taken / 1e9,
    }


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _entry(found: dict[str, Any]) -> str:
    return f"{Tile(**found['tile'])}  # {found['milliseconds']:.3f} ms"


def offline(quick: bool, candidates_too: bool) -> dict[str, Any]:
    """Registers, shared memory and instructions of every shipped tile, and of the candidates if wanted."""
    tables = []
    print("shipped, with every mask and per-head gradient at once, or without an edge")
    for kernel, width, dtype, tile, edges in shipped():
        if quick and (width != 64 or dtype != torch.bfloat16):
            continue
        masks = (CAUSAL, EVERYTHING) if edges else (FULL_MASK, NO_EDGES)
        for choice in masks[-1:] if quick else masks:
            for part in parts(kernel, tile):
                tables.append(_compile(kernel, width, tile, choice, part, dtype))
    tried: list[dict[str, Any]] = []
    if not candidates_too:
        return {"shipped": tables}
    print("candidates, packed documents")
    for kernel in TRAINING:
        for width in (64,) if quick else WIDTHS:
            for tile in list(candidates(kernel, width))[: 1 if quick else None]:
                for part in parts(kernel, tile):
                    tried.append(_compile(kernel, width, tile, PACKED, part, torch.bfloat16))
    return {"shipped": tables, "candidates": tried}


def _compile(
    kernel: Kernel, width: int, tile: Tile, masks: Masks, part: str, dtype: torch.dtype
) -> dict[str, Any]:
    about = {"kernel": kernel, "part": part, "width": width, "dtype": str(dtype), "masks": str(masks)}
    resources = compile_tile(kernel, width, tile, dtype=dtype, masks=masks, part=part)
    found = complaints(resources, matrix_products=kernel != "decode")
    blocks = resident_blocks(resources)
    print(
        f"{kernel} {part} D{width} [{masks}] {tile}: {blocks} blocks, {resources} {'; '.join(found)}",
        flush=True,
    )
    return {
        **about,
        "tile": asdict(tile),
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": resources.shared_bytes,
        "resident_blocks": blocks,
        "instructions": {name: count for name, count in resources.instructions.items() if count},
        "complaints": found,
    }


def resident_blocks(resources: Resources) -> int:
    """Thread blocks that one multiprocessor holds at once. Registers are given out in eights."""
    registers = -(-resources.registers // 8) * 8 * resources.threads
    reserved = resources.shared_bytes + 1024
    return min(
        REGISTERS // registers, (SHARED_BYTES + 1024) // reserved, RESIDENT_THREADS // resources.threads
    )
