"""The recurrence kernels compiled for Hopper without a GPU: no spills at the tile shapes that ship."""

from __future__ import annotations

import pytest

from kernels.newton_rnn.variants import Variant, variants
from kernels.offline import complaints

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
