"""What the pipelines need of a tokenizer, and what a dataset records of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the pipelines need of a tokenizer. Ids do not include the end-of-text token `eot`."""

    vocabulary: int
    eot: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text: uint16, or uint32 for vocabularies above 65,536."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, on several threads where that is faster."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; broken UTF-8 becomes U+FFFD, the end-of-text token its name."""

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """The characters of a text that its ids do not hold, because the tokenizer has no token for them."""

    def rewrites(self, text: str) -> bool:
        """Whether it makes another text of this one before it looks for tokens (small letters, composed accents)."""

    def normalized(self, text: str) -> str:
        """The text in which it looks for tokens."""

    def byte_lengths(self) -> np.ndarray | None:
        """(V,) int64: UTF-8 bytes that each id stands for, 0 for end-of-text; None where tokens are not made of
        bytes."""

    def describe(self) -> str:
        """One line for people."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Store what `load_tokenizer` needs in a dataset folder; returns its entry for dataset.json."""


def recorded_entry(tokenizer: Tokenizer, kind: str, file: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "file": file,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocabulary,
        "eot": tokenizer.eot,
    }
