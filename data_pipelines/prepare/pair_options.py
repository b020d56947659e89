"""How datasets of pairs are built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_codecs import (
    is_trained,
)
from data_pipelines.tokens.vocabulary import TASKS


@dataclass(frozen=True)
class PairOptions:
    """How to build.

    image_codec: a codec's folder, `patch:CODES:SIZE`, or `codes:CODES:ROWSxCOLUMNS` for codes of an unknown codec.
    audio_codec: a codec's folder, `spectral:CODES[:CODEBOOKS[:SAMPLE_RATE]]`, or `codes:CODES[:CODEBOOKS]`.
    tokenizer: bytes, bpe:N, a tokenizer.json, or a dataset; None: that of `vocabulary`, else bpe:8192.
    tasks: empty: all that the samples allow.
    text_slot: tokens of a text target; None: the longest caption and its end-of-text.
    vocabulary: a dataset whose vocabulary, tokenizer and codecs are taken.
    delay: the delay pattern for audio of several codebooks.
    strict: what would be left out or lost is an error.
    end_of_text: the name of that token in a tokenizer.json.
    """

    image_codec: str | None = None
    audio_codec: str | None = None
    tokenizer: str | None = None
    tasks: tuple[str, ...] = ()
    text_slot: int | None = None
    vocabulary: Path | None = None
    delay: bool = False
    validation_fraction: float = 0.05
    shard_megabytes: float = 256
    seed: int = 0
    force: bool = False
    strict: bool = False
    end_of_text: str | None = None

    def modalities(self) -> set[str]:
        """image, audio: what the tasks need besides text."""
        return {name for task in self.tasks or TASKS for name in TASKS[task]} - {"text"}

    def codecs(self) -> dict[str, str | None]:
        """What was said of each modality's codec."""
        return {"image": self.image_codec, "audio": self.audio_codec}

    def trains(self, name: str) -> bool:
        """Whether a codec is to be trained for a modality."""
        return self.vocabulary is None and is_trained(self.codecs()[name])

    def check(self) -> None:
        """Raises DataError for a value out of range."""
        for task in self.tasks:
            if task not in TASKS:
                raise DataError(f"--tasks {task}: no such task; there are {', '.join(TASKS)}.")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"--validation-fraction {self.validation_fraction}: at least 0 and below 1.")
        if not math.isfinite(self.shard_megabytes) or self.shard_megabytes <= 0:
            raise DataError(f"--shard-megabytes {self.shard_megabytes}: it must be a positive number.")
        if self.text_slot is not None and self.text_slot < 2:
            raise DataError(f"--text-slot {self.text_slot}: at least 2, a token and end-of-text.")
        if not -(2**63) <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}: it must be a number of 64 bits.")
