"""Makes Triton's interpreter compute bfloat16 as numbers.

It keeps bfloat16 as uint16 bit patterns, and its arithmetic (dot, binary and unary operations) works on those
bits as if they were integers, without an error; its cast from float32 truncates where a GPU rounds to the
nearest even. Seen in Triton 3.6.0 and 3.7.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, rounded to the nearest even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def as_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def compute_bfloat16_as_numbers() -> None:
    """Replace the interpreter's operations by ones that widen, compute, and narrow."""
    builder = InterpreterBuilder
    for name in ("create_dot", "binary_op", "unary_op", "create_fma", "cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _REPLACEMENTS[name](getattr(builder, name)))


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, as_float32(a), as_float32(b), acc, *rest)

    return dot


def _binary(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: Any, left: TensorHandle, right: TensorHandle, operation: Any) -> TensorHandle:
        if not is_bfloat16(left):
            return original(self, left, right, operation)
        result = operation(widen(left.data), widen(right.data))
        return (
            TensorHandle(result, tl.int1)
            if result.dtype == bool
            else TensorHandle(narrow(result), tl.bfloat16)
        )

    return binary


def _unary(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary(self: Any, argument: TensorHandle, operation: Any) -> TensorHandle:
        if not is_bfloat16(argument):
            return original(self, argument, operation)
        return TensorHandle(narrow(operation(widen(argument.data))), tl.bfloat16)

    return unary


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not is_bfloat16(x):
            return original(self, x, y, z)
        return TensorHandle(narrow(widen(x.data) * widen(y.data) + widen(z.data)), tl.bfloat16)

    return fma


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        given, wanted = source.dtype.scalar, target.scalar
        if given == wanted:
            return original(self, source, target)
        if given == tl.bfloat16:
            wide = TensorHandle(widen(source.data), tl.float32)
            return wide if wanted == tl.float32 else original(self, wide, target)
        if wanted == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, target)

    return cast


def _float_to_float(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        types = (source.dtype.scalar, target.scalar)
        narrow_float = any(dtype.primitive_bitwidth < 16 for dtype in types)
        if tl.bfloat16 not in types or narrow_float:
            return original(self, source, target, rounding)
        return self.cast_impl(source, target)

    return convert


_REPLACEMENTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "create_dot": _dot,
    "binary_op": _binary,
    "unary_op": _unary,
    "create_fma": _fma,
    "cast_impl": _cast,
    "create_fp_to_fp": _float_to_float,
}
