"""Offline compilation for Hopper: what it reports, and what it complains about."""

from __future__ import annotations

import dataclasses

import pytest
import triton
import triton.language as tl

from kernels.offline import SHARED_BYTES, compile_offline, complaints


@triton.jit
def _multiply(A, B, C, N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(A + i * N + j), tl.load(B + i * N + j))
    tl.store(C + i * N + j, product.to(C.dtype.element_ty))


TYPES = {"A": "*bf16", "B": "*bf16", "C": "*bf16"}


def test_a_matrix_product_uses_hoppers_instruction() -> None:
    resources = compile_offline(_multiply, types=TYPES, constants={"N": 64})
    assert resources.instructions["HGMMA"] > 0
    assert resources.threads == 128
    assert resources.shared_bytes >= 2 * 64 * 64 * 2
    assert complaints(resources, matrix_products=True) == []


def test_complaints_name_spills_shared_memory_and_the_slow_product() -> None:
    good = compile_offline(_multiply, types=TYPES, constants={"N": 64})
    bad = dataclasses.replace(
        good,
        spill_bytes=40,
        shared_bytes=SHARED_BYTES + 1,
        registers=255,
        threads=512,
        instructions={**good.instructions, "HGMMA": 0, "HMMA": 8},
    )
    text = "; ".join(complaints(bad, matrix_products=True))
    for part in ("0 HGMMA and 8 HMMA", "spills 40 B", "shared memory", "255 registers x 512 threads"):
        assert part in text


def test_an_argument_without_a_type_is_named() -> None:
    with pytest.raises(ValueError, match="_multiply: no type and no constant for C"):
        compile_offline(_multiply, types={"A": "*bf16", "B": "*bf16"}, constants={"N": 64})


@triton.jit
def _shares(X, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + at)
    tl.store(X + at, x / tl.sum(tl.sum(x, 1), 0))


def test_a_limit_of_registers_is_kept_and_its_spills_are_named() -> None:
    free = compile_offline(_shares, types={"X": "*fp32"}, constants={"N": 128})
    tight = compile_offline(_shares, types={"X": "*fp32"}, constants={"N": 128}, max_registers=64)
    assert tight.registers <= 64 < free.registers
    assert complaints(free, matrix_products=False) == []
    assert any("spills" in complaint for complaint in complaints(tight, matrix_products=False))
