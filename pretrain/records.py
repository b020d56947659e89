"""Reading what a run has logged: lines of JSON, of which one may be torn, and any may have been damaged since.

What is no record is passed over, and so is a value of another kind than its key has: who looks at a run must not fail
on what it left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")

LARGEST = 2**63
NUMBERS = ("attempt", "step", "last_step", "step_before", "ended", "exit_code")
"""Of a ledger's line, where it has them."""
NEEDED = {"attempt": ("attempt",), "attempt_end": ("attempt", "step"), "save": ("step",), "start": ("step",)}


def read_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """The JSON object of each line that is not empty; None for one that is no object."""
    for line in filter(None, lines):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        yield found if isinstance(found, dict) else None


def objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among some lines."""
    return (found for found in read_lines(lines) if found is not None)


def metric_records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Each with its step, and the scalars that are numbers."""
    for found in objects(lines):
        if is_count(found.get("step")):
            yield {key: value for key, value in found.items() if _is_number(value)}


def ledger_records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Each with its event, and `at`, seconds since 1970."""
    for found in objects(lines):
        event, at = found.get("event"), _seconds(found.get("time"))
        if not isinstance(event, str) or at is None:
            continue
        kept = {key: value for key, value in found.items() if key not in NUMBERS or _is_number(value)}
        if all(is_count(kept.get(key)) for key in NEEDED.get(event, ())):
            yield {**kept, "at": at}


def is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LARGEST


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return -LARGEST < value < LARGEST
    return isinstance(value, float) and math.isfinite(value)


def _seconds(text: Any) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def counted(text: bytes, records: Callable[[Iterable[bytes]], Iterable[T]]) -> tuple[list[T], int]:
    """What `records` reads in a log, and how many whole lines it could not; the last line may be torn, where a process
    died while it wrote it."""
    *whole, last = text.split(b"\n")
    found = list(records(whole))
    return [*found, *records([last])], sum(map(bool, whole)) - len(found)
