"""Sizes that the DeepSpeed engine is given, and the plan reckons with."""

from __future__ import annotations

MOST_BUCKET_ELEMENTS = 50_000_000
"""100 MB of bf16: large enough for any link to reach its speed."""


def bucket_elements(parameters: int) -> int:
    """Elements of one reduction. DeepSpeed's own default, 5e8, sets aside 2 GB even for a tiny model."""
    return min(parameters, MOST_BUCKET_ELEMENTS)


def small_parameter(width: int) -> int:
    """Elements up to which a parameter stays whole on every rank under ZeRO 3: norms and the like. DeepSpeed's own
    default would keep all of a tiny model whole."""
    return 4 * width
