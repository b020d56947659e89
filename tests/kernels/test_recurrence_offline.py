"""The recurrence kernels compiled for Hopper without a GPU: no spills at the tile shapes that ship."""

from __future__ import annotations

import pytest

from kernels.newton_rnn import tiles
from kernels.newton_rnn.variants import Variant, variants
from kernels.offline import REGISTERS, complaints

HALF, FULL = variants(half=True), variants(half=False)


@pytest.mark.parametrize("variant", HALF, ids=lambda variant: variant.name)
def test_no_spills_in_half_precision(variant: Variant) -> None:
    assert complaints(variant.compile(), matrix_products=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL, ids=lambda variant: variant.name)
def test_no_spills_in_full_precision(variant: Variant) -> None:
    assert complaints(variant.compile(), matrix_products=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", FULL, ids=lambda variant: variant.name)
def test_sizes_of_one_compile(variant: Variant) -> None:
    """A launch turns arguments of value 1 into constants, which a kernel must bear."""
    ones = dict.fromkeys(("T", "D", "N", "iterations", "max_iterations"), 1)
    resources = variant.compile(**ones, ONE_HEAD=False, W=4, C=1)
    assert complaints(resources, matrix_products=False) == []


@pytest.mark.parametrize("variant", [v for v in HALF if v.max_registers], ids=lambda variant: variant.name)
def test_a_limit_of_registers_is_kept(variant: Variant) -> None:
    """The choice of a tile reckons with two programs of these on a multiprocessor."""
    assert variant.max_registers is not None
    resources = variant.compile()
    assert resources.registers <= variant.max_registers
    assert 2 * resources.registers * resources.threads <= REGISTERS


def test_long_windows_run_where_all_their_programs_fit_at_once() -> None:
    for lstm, window in ((False, 256), (True, 128)):
        pair = tiles.NEWTON[lstm]
        assert pair.few.resident == 2
        assert tiles.tile_of(pair, 1, 2048) == pair.few  # 256 programs, two to a multiprocessor
        assert tiles.tile_of(pair, 1, 2048).window == window
        assert tiles.tile_of(pair, 2, 2048) == pair.many
    pair = tiles.ADJOINT[False]
    assert tiles.tile_of(pair, 1, 1024) == pair.few
    assert tiles.tile_of(pair, 1, 2048) == pair.many  # 256 programs, one to a multiprocessor
