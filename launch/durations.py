"""Time limits as Slurm writes them."""

from __future__ import annotations

import re


def minutes_of(text: str) -> int:
    """Minutes of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, or days-hours
    and what may follow. Rounded up. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time limit; write minutes, hours:minutes:seconds or days-hours")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    total_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total_s == 0:
        raise ValueError(f"{text!r}: a time limit must be above 0")
    return -(-total_s // 60)
