"""Settings of the sigmoid-attention Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from models.layers.config import DecoderConfig, Problem


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(DecoderConfig):
    """`attention_bias` is the constant logit bias; None means -ln(training sequence length).

    It belongs to the function the model computes, so it is resolved once, at the start of training, and kept.
    """

    family: Literal["sigmoid"] = "sigmoid"
    attention_bias: float | None = None

    row_order: ClassVar[Literal["contiguous", "balanced"]] = "balanced"

    def resolved(self, *, vocabulary: int, sequence_length: int) -> SigmoidConfig:
        """The same settings with the vocabulary and the attention bias filled in where they were None."""
        bias = -math.log(sequence_length) if self.attention_bias is None else self.attention_bias
        size = vocabulary if self.vocabulary is None else self.vocabulary
        return replace(self, vocabulary=size, attention_bias=bias)

    def problems(self, sequence_length: int) -> list[Problem]:
        found = super().problems(sequence_length)
        if self.attention_bias is not None and not math.isfinite(self.attention_bias):
            found.append(("attention_bias", f"{self.attention_bias} must be finite, or null for -ln(length)"))
        return found
