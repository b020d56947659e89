"""Settings of the bidirectional Transformer over text, image and audio tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from models.layers.config import DecoderConfig, Problem, undivided, unknown_choices
from models.layers.work import Kernel

CHOICES = {"attention": ("softmax", "sigmoid"), "image_positions": ("1d", "2d")}


@dataclass(frozen=True, kw_only=True)
class TrimodalConfig(DecoderConfig):
    """A decoder's settings, with every token of a document in sight of every other.

    attention: what turns scores into weights.
    attention_bias: sigmoid only: the constant logit bias; None means -ln(training sequence length), resolved once,
        at the start of training, and kept.
    image_positions: "2d" gives a token of an image its row and its column, each on half of the rotary
        frequencies; "1d" its place in the document, as every other token.
    """

    family: Literal["trimodal"] = "trimodal"
    attention: Literal["softmax", "sigmoid"] = "softmax"
    attention_bias: float | None = None
    image_positions: Literal["1d", "2d"] = "1d"
    positions: Literal["alibi", "rope"] = "rope"
    tied_head: bool = False

    causal: ClassVar[bool] = False
    logit_share: ClassVar[float] = 0.5
    """Share of the tokens whose logits are made: the mean mask ratio of the linear schedule on rows of text. A
    constant, so that it belongs to the model and not to a run's schedules and data."""

    @property
    def position_axes(self) -> int:
        """1 for positions (B, T), 2 for positions (B, T, 2)."""
        return 2 if self.image_positions == "2d" else 1

    @property
    def attention_kernel(self) -> Kernel:
        return "softmax attention" if self.attention == "softmax" else "sigmoid attention"

    def swap_problems(self, parts: int) -> list[str]:
        if self.attention == "sigmoid":
            return []
        return undivided({"heads": self.heads, "kv_heads": self.key_heads}, parts)

    def resolved(self, *, vocabulary: int, sequence_length: int) -> TrimodalConfig:
        """The same settings with the vocabulary, and a sigmoid's bias, filled in where they were None."""
        bias = self.attention_bias
        if self.attention == "sigmoid" and bias is None:
            bias = -math.log(sequence_length)
        size = vocabulary if self.vocabulary is None else self.vocabulary
        return replace(self, vocabulary=size, attention_bias=bias)

    def problems(self, sequence_length: int) -> list[Problem]:
        found = super().problems(sequence_length) + unknown_choices(self, CHOICES)
        if self.positions == "alibi":
            message = (
                "'alibi' falls off by the distance |i - j| to either side alike: without a causal mask no token could "
                "tell left from right; use rope"
            )
            found.append(("positions", message))
        if self.attention_bias is not None:
            if self.attention == "softmax":
                message = (
                    f"{self.attention_bias}: a constant cancels in a softmax; set attention: sigmoid or null"
                )
                found.append(("attention_bias", message))
            elif not math.isfinite(self.attention_bias):
                message = f"{self.attention_bias} must be finite, or null for -ln(length)"
                found.append(("attention_bias", message))
        if self.image_positions == "2d" and min(self.width, self.heads) > 0 and self.head_width % 4:
            message = (
                f"2-D positions halve the rotary frequencies, so a head's width must divide by 4, and width "
                f"{self.width} / {self.heads} heads = {self.head_width}; use another number of heads, or "
                "image_positions: 1d"
            )
            found.append(("image_positions", message))
        return found
