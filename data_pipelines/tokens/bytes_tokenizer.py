"""The tokenizer whose ids are the bytes of UTF-8."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.raw.json_text import repaired
from data_pipelines.tokens.tokenizer import recorded_entry
from data_pipelines.tokens.tokenizer_files import (
    EOT,
)


class BytesTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 ends a document."""

    vocabulary = 257
    eot = 256
    fingerprint = hashlib.sha256(b"triptych bytes tokenizer, 257 ids").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, uint16; half a surrogate pair is U+FFFD."""
        return np.frombuffer(repaired(text).encode(), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids."""
        mark = EOT.encode()
        return b"".join(mark if i == 256 else bytes((i,)) for i in map(int, ids)).decode(errors="replace")

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """None."""
        return Counter()

    def rewrites(self, text: str) -> bool:
        """Never."""
        return False

    def normalized(self, text: str) -> str:
        """The text itself."""
        return text

    def byte_lengths(self) -> np.ndarray:
        """One each."""
        return np.append(np.ones(256, np.int64), 0)

    def describe(self) -> str:
        """One line for people."""
        return "bytes (257 ids)"

    def save(self, folder: Path) -> dict[str, Any]:
        """Nothing to store but the kind."""
        return recorded_entry(self, "bytes", None)
