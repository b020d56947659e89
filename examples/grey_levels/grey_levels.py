"""Small grey pictures, each point rounded to one of a few levels: a codec of one's own, with nothing to learn.

`python -m grey_levels FOLDER` writes one, for `triptych data pairs --image-codec FOLDER`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np


class GreyLevels:
    """See `data_pipelines.codecs.base`: codes row by row, 0 (black) to levels - 1 (white)."""

    modality = "image"
    codebooks = 1
    colours = 1

    def __init__(self, side: int, levels: int) -> None:
        if not (1 <= side <= 64 and 2 <= levels <= 256):
            raise ValueError(f"side {side} should be 1 to 64, levels {levels} 2 to 256")
        self.height = self.width = side
        self.codebook_size = levels
        self.grid = (side, side)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()

    @property
    def _content(self) -> dict[str, str | int]:
        return {"kind": "grey_levels:GreyLevels", "side": self.height, "levels": self.codebook_size}

    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [sample.astype(np.int64).ravel() * self.codebook_size // 256 for sample in samples]

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        levels = ((np.arange(self.codebook_size) + 0.5) * 256 / self.codebook_size).astype(np.uint8)
        return [levels[code].reshape(self.grid) for code in codes]

    def describe(self) -> str:
        return f"{self.height} x {self.width} points of {self.codebook_size} grey levels"

    def save(self, folder: Path) -> None:
        (Path(folder) / "codec.json").write_text(json.dumps(self._content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        content = json.loads((Path(folder) / "codec.json").read_text(encoding="utf-8"))
        return cls(int(content["side"]), int(content["levels"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="grey_levels", description="Write a codec's folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--levels", type=int, default=16)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    GreyLevels(chosen.side, chosen.levels).save(chosen.folder)
