"""The size of the buffers that gradients are reduced in."""

from __future__ import annotations

MOST_BUCKET_ELEMENTS = 50_000_000
"""100 MB of bf16: large enough for any link to reach its speed."""


def bucket_elements(parameters: int) -> int:
    """Elements of one reduction. DeepSpeed's own default, 5e8, sets aside 2 GB even for a tiny model."""
    return min(parameters, MOST_BUCKET_ELEMENTS)
