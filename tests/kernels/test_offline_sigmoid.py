"""Every shipped block shape of sigmoid attention, compiled for Hopper without a GPU.

Prints what each takes (`pytest -rP`); `python -m benchmarks.attention --offline` writes the same to a file.
"""

from __future__ import annotations

import pytest
import torch

from kernels.offline import complaints
from kernels.sigmoid_attention.offline import EVERYTHING, FULL_MASK, compile_tile, parts, shipped
from kernels.sigmoid_attention.tiles import Kernel, Tile, padded

SHIPPED = list(shipped())


@pytest.mark.parametrize(("kernel", "width", "dtype", "tile", "edges"), SHIPPED, ids=str)
def test_a_shipped_shape_uses_the_tensor_cores_and_spills_nothing(
    kernel: Kernel, width: int, dtype: torch.dtype, tile: Tile, edges: bool
) -> None:
    """With every mask and per-head gradient at once, which takes most registers; or without any edge."""
    for part in parts(kernel, tile):
        masks = EVERYTHING if edges else FULL_MASK
        resources = compile_tile(kernel, width, tile, dtype=dtype, masks=masks, part=part)
        print(f"{kernel} {part}, width {width}, {tile}: {resources}")
        # A decode has 16 rows, too few for Hopper's product, and waits for memory anyway.
        assert complaints(resources, matrix_products=kernel != "decode") == []


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
