"""Settings of the softmax-attention Transformer, the baseline of the sigmoid family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from models.layers.config import DecoderConfig, undivided
from models.layers.work import Kernel


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(DecoderConfig):
    """The sigmoid family's settings without the attention bias."""

    family: Literal["softmax"] = "softmax"

    @property
    def attention_kernel(self) -> Kernel:
        return "softmax attention"

    def swap_problems(self, parts: int) -> list[str]:
        return undivided({"heads": self.heads, "kv_heads": self.key_heads}, parts)

    def resolved(self, *, vocabulary: int, sequence_length: int) -> SoftmaxConfig:
        """The same settings with the vocabulary filled in where it was None."""
        return replace(self, vocabulary=vocabulary if self.vocabulary is None else self.vocabulary)
