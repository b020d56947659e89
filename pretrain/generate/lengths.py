"""How long what is made usually is: learned from a run's data, and kept beside its tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pretrain.errors import UserError
from pretrain.generate.documents import Document
from pretrain.json_text import to_json

FILE = "target_lengths.json"
Lengths = Mapping[str, Mapping[int, int]]
"""By task (of TASK_NAMES): how many documents had so many target tokens, end-of-text included."""


def count_lengths(documents: Iterable[Document]) -> dict[str, dict[int, int]]:
    """The lengths of some documents' targets."""
    found: dict[str, Counter[int]] = {}
    for document in documents:
        found.setdefault(document.task, Counter())[len(document.target)] += 1
    return {task: dict(sorted(counts.items())) for task, counts in found.items()}


def save_lengths(lengths: Lengths, folder: Path) -> None:
    (folder / FILE).write_text(to_json(lengths, indent=1) + "\n", encoding="utf-8")


def load_lengths(folder: Path) -> dict[str, dict[int, int]]:
    """What `save_lengths` wrote; nothing where it never did."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {
            task: {int(length): int(count) for length, count in counts.items()}
            for task, counts in content.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete it, and say with --tokens how long texts and sounds are"
        ) from None


def usual_length(lengths: Lengths, task: str, above: int = 0) -> int:
    """The most common length of the task that is greater than `above`.

    Raises UserError where the data had none.
    """
    counts = {length: count for length, count in lengths.get(task, {}).items() if length > above}
    if not counts:
        longer = f" of more than {above} tokens" if above else ""
        raise UserError(f"--tokens: the data had no {task} document{longer}; say how many tokens to make")
    return max(counts, key=lambda length: (counts[length], -length))


def draw_length(lengths: Lengths, task: str, random: np.random.Generator) -> int:
    """A length as often as the data had it. Raises UserError where the data had none."""
    usual_length(lengths, task)
    counts = lengths[task]
    shares = np.asarray(list(counts.values()), np.float64)
    return int(random.choice(np.asarray(list(counts)), p=shares / shares.sum()))
