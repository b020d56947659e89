"""Every shipped block shape of sigmoid attention, compiled for Hopper without a GPU.

Prints what each takes (`pytest -rP`); `python -m benchmarks.attention --offline` writes the same to a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from kernels.offline import Resources, complaints
from kernels.sigmoid_attention.offline import (
    EVERYTHING,
    FULL_MASK,
    KERNELS,
    NO_EDGES,
    compile_tile,
    parts,
    shipped,
)
from kernels.sigmoid_attention.tiles import HALF, Kernel, Tile, padded

SHIPPED = list(shipped())
Entry = tuple[Kernel, int, torch.dtype, Tile, bool]


@pytest.fixture(scope="module")
def resources_of() -> Iterator[Callable[[Entry], dict[str, Resources]]]:
    """Compiles every entry in processes of their own: the compiler takes most of a minute on one core."""
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn")) as pool:
        futures: dict[Entry, Future[dict[str, Resources]]] = {x: pool.submit(compiled, x) for x in SHIPPED}
        yield lambda entry: futures[entry].result(timeout=250)
        pool.shutdown(cancel_futures=True)


def compiled(entry: Entry) -> dict[str, Resources]:
    """Each launch of an entry: with every mask and per-head gradient at once, or all that is without an edge."""
    kernel, width, dtype, tile, edges = entry
    masks = EVERYTHING if edges else NO_EDGES
    return {
        part: compile_tile(kernel, width, tile, dtype=dtype, masks=masks, part=part)
        for part in parts(kernel, tile)
    }


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: "-".join(map(str, entry)))
def test_a_shipped_shape_uses_the_tensor_cores_and_spills_nothing(
    entry: Entry, resources_of: Callable[[Entry], dict[str, Resources]]
) -> None:
    kernel, width, _, tile, _ = entry
    for part, resources in resources_of(entry).items():
        print(f"{kernel} {part}, width {width}, {tile}: {resources}")
        # A decode has too few rows for Hopper's product to matter, and waits for memory anyway.
        assert complaints(resources, matrix_products=kernel != "decode") == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_of_one_compile(kernel: Kernel) -> None:
    """A launch turns integers of value 1 into constants, which a kernel must bear."""
    resources = compile_tile(kernel, 16, HALF[kernel][16], masks=EVERYTHING, sizes_of_one=True)
    assert complaints(resources, matrix_products=False) == []


def test_the_bias_costs_no_instruction() -> None:
    """Scaling the product takes one multiply-add per weight with a bias, and would take a multiplication without."""
    tile = Tile(128, 64, 8, 3, polynomial=False)
    counts = compile_tile("forward", 64, tile, masks=FULL_MASK).instructions
    weights = 128 * 64 // 256
    assert counts["FFMA"] == weights
    assert counts["MUFU.EX2"] == weights
    assert counts["FADD"] == weights  # the 1 in 1 + 2^y
    assert counts["FMUL"] == 0


def test_the_polynomial_halves_the_special_functions() -> None:
    tile = Tile(128, 64, 8, 3, polynomial=True)
    counts = compile_tile("forward", 64, tile, masks=FULL_MASK).instructions
    weights = 128 * 64 // 256
    assert counts["MUFU.EX2"] == weights
    assert counts["MUFU.RCP"] < 8  # of the integer divisions that find a program's block, not of weights
    assert counts["MUFU.TANH"] == 0


def test_widths_are_padded_to_what_the_tables_hold() -> None:
    assert [padded(width) for width in (1, 16, 17, 59, 64, 96, 129, 256)] == [
        16,
        16,
        32,
        64,
        64,
        128,
        256,
        256,
    ]
