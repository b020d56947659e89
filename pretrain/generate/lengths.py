"""How long what is made usually is: learned from a run's data, and kept beside its tokenizer.

A sound is as long as the data's sounds of the same caption are, or, of a caption that is new or rare, as those of
captions with about as many tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.rows.pair_lengths import TargetLengths
from pretrain.errors import UserError
from pretrain.generate.documents import Document
from pretrain.json_text import to_json

FILE = "target_lengths.json"
BY_CAPTION_FILE = "target_lengths_by_caption.json"
NEIGHBOURS = 20
"""Documents whose captions have about as many tokens, of which one gives the length."""
Lengths = Mapping[str, Mapping[int, int]]
"""By task (of TASK_NAMES): how many documents had so many target tokens, end-of-text included."""


@dataclass(frozen=True)
class CaptionLengths:
    """Of one task: lengths by the number of a caption's tokens, and by the caption's ids where it is frequent."""

    by_tokens: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    by_caption: Mapping[tuple[int, ...], Mapping[int, int]] = field(default_factory=dict)

    def of(self, caption: Sequence[int]) -> dict[int, int]:
        """What is known of captions like this one: how many documents had each length."""
        own = self.by_caption.get(tuple(caption))
        if own:
            return dict(own)
        found: Counter[int] = Counter()
        for count in sorted(self.by_tokens, key=lambda count: (abs(count - len(caption)), count)):
            if found.total() >= NEIGHBOURS:
                break
            found.update(self.by_tokens[count])
        return dict(found)


def count_lengths(documents: Iterable[Document]) -> dict[str, dict[int, int]]:
    """The lengths of some documents' targets."""
    found: dict[str, Counter[int]] = {}
    for document in documents:
        found.setdefault(document.task, Counter())[len(document.target)] += 1
    return {task: dict(sorted(counts.items())) for task, counts in found.items()}


def save_lengths(lengths: TargetLengths, folder: Path) -> None:
    """Write both files into a run's tokenizer folder."""
    tasks = {task: dict(sorted(counts.items())) for task, counts in sorted(lengths.tasks.items())}
    (folder / FILE).write_text(to_json(tasks, indent=1) + "\n", encoding="utf-8")
    by_caption = {
        task: {
            "by_tokens": {count: dict(sorted(found.items())) for count, found in sorted(by_tokens.items())},
            "by_caption": {
                " ".join(map(str, ids)): dict(sorted(found.items()))
                for ids, found in lengths.by_caption.get(task, {}).items()
            },
        }
        for task, by_tokens in lengths.by_tokens.items()
    }
    (folder / BY_CAPTION_FILE).write_text(to_json(by_caption) + "\n", encoding="utf-8")


def load_lengths(folder: Path) -> dict[str, dict[int, int]]:
    """The lengths by task that `save_lengths` wrote; nothing where it never did."""
    try:
        return {task: _counts(counts) for task, counts in _load(folder / FILE).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(folder / FILE, error) from None


def load_caption_lengths(folder: Path) -> dict[str, CaptionLengths]:
    """The lengths by task and caption that `save_lengths` wrote; nothing where it never did."""
    path = folder / BY_CAPTION_FILE
    try:
        return {
            task: CaptionLengths(
                {int(count): _counts(found) for count, found in content["by_tokens"].items()},
                {
                    tuple(int(one) for one in ids.split()): _counts(found)
                    for ids, found in content["by_caption"].items()
                },
            )
            for task, content in _load(path).items()
        }
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise _damaged(path, error) from None


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return content


def _counts(content: Any) -> dict[int, int]:
    return {int(length): int(count) for length, count in content.items()}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: damaged ({error}); delete it, and say with --tokens how long texts and sounds are"
    )


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
    return _draw(lengths[task], random)


def draw_length_for(
    captions: CaptionLengths, lengths: Lengths, task: str, caption: Sequence[int], random: np.random.Generator
) -> int:
    """A length as often as the data had it for captions like this one. Raises UserError where the data had none."""
    counts = captions.of(caption)
    return _draw(counts, random) if counts else draw_length(lengths, task, random)


def _draw(counts: Mapping[int, int], random: np.random.Generator) -> int:
    shares = np.asarray(list(counts.values()), np.float64)
    return int(random.choice(np.asarray(list(counts)), p=shares / shares.sum()))
