"""Texts and JSON that are hard to read."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.base import chosen

WORDS = (
    "seven",
    "Größe",
    "日本",
    "a b",
    "\u2028",
    "\u0085",
    "\ufeff",
    "\U0001f600",
    "x" * 50,
    '"',
    "\\",
    "\t",
    "</s>",
)
HALF = "\ud800"
DEEP = "[" * 100_000 + "]" * 100_000


def text_of_words(random: np.random.Generator, half: bool = False) -> str:
    words = (*WORDS, HALF) if half else WORDS
    return " ".join(chosen(random, words) for _ in range(int(random.integers(0, 8))))


def changed_json(content: Any, random: np.random.Generator) -> Any:
    """JSON with one of its values exchanged, left out or put in twice, anywhere in it."""
    holder: Any = None
    key: Any = None
    inner = content
    while isinstance(inner, dict | list) and inner and (holder is None or random.random() < 0.8):
        holder = inner
        key = chosen(random, list(holder)) if isinstance(holder, dict) else int(random.integers(len(holder)))
        inner = holder[key]
    if holder is None:
        return content
    value = chosen(random, [None, 0, -1, 2**40, "", "a", "Ġ", [], {}, [1], True, 0.5, "delete", "twice"])
    if value == "delete":
        del holder[key]
    elif value == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = value
    return content
