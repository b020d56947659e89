"""JSON as everyone reads it: of numbers that are not finite the standard knows none, and Python writes `NaN`."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, with null for numbers that are not finite.

    Raises:
        TypeError: something in it is no JSON value.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def number_of(value: float | None) -> float:
    """A number that `to_json` wrote: null was one that is not finite."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
