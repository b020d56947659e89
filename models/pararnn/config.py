"""Settings of the ParaRNN family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from kernels.newton_rnn.solver import Solver, split_problems
from models.layers.config import Problem, divisors, not_positive, swiglu_width, undivided, unknown_choices
from models.layers.work import Product, Stream, Work, convolution, feed_forward, gate, norm, residual

CELLS = {"gru": 3, "lstm": 3, "elman": 1}
"""The cells' names, and how many gates each has; `models.pararnn.cells` has their classes."""


@dataclass(frozen=True, kw_only=True)
class NewtonConfig(Solver):
    """How the recurrence is solved (`kernels.newton_rnn.Solver`). A misspelt key is an error."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class ParaRNNConfig:
    """A language model whose mixers are nonlinear recurrences.

    `cell` is a name in `CELLS`. `heads` are input heads: each projects its part of the
    width to the gates of its part of the channels. `mlp_width` None means `swiglu_width(width)`, 0 no
    feed-forward layer. `vocabulary` None means that the dataset's tokenizer decides. `recurrent_clip` bounds
    the recurrent and peephole weights, None does not; three Newton iterations are enough up to 0.5.
    `block`: "full" is the language model's; "mixer" is the cell alone between embedding and head.
    `initialisation` of the matrices that are not the cell's: "fan_in" draws from N(0, 1 / fan_in), the
    embedding from N(0, 1 / width); "dclm" does so within three deviations, and divides those back to the
    residual stream by sqrt(2 layer), layer 1 being the first; "small" from N(0, 0.02^2), those back divided by
    sqrt(branches); "torch" as `nn.Linear` and `nn.Embedding` do: U(+-1 / sqrt(fan_in)) and N(0, 1).
    """

    changeable: ClassVar[tuple[str, ...]] = ("newton", "recurrent_clip")
    """Settings that a resumed run may change: how the recurrence is solved, and what the alarm advises."""

    causal: ClassVar[bool] = True
    row_order: ClassVar[Literal["contiguous", "balanced"]] = "contiguous"

    family: Literal["pararnn"] = "pararnn"
    cell: str
    layers: int
    width: int
    heads: int = 4
    vocabulary: int | None = None
    mlp_width: int | None = None
    block: Literal["full", "mixer"] = "full"
    conv_width: int = 4
    recurrent_clip: float | None = 0.5
    newton: NewtonConfig = field(default_factory=NewtonConfig)
    tied_head: bool = False
    norm_epsilon: float = 1e-5
    initialisation: Literal["fan_in", "dclm", "small", "torch"] = "fan_in"

    @property
    def hidden_width(self) -> int:
        return swiglu_width(self.width) if self.mlp_width is None else self.mlp_width

    def resolved(self, *, vocabulary: int, sequence_length: int) -> ParaRNNConfig:
        """The same settings with the vocabulary filled in where it was None."""
        return replace(self, vocabulary=vocabulary if self.vocabulary is None else self.vocabulary)

    def block_products(self, sequence_length: int) -> float:
        """Multiply-adds of a block's matrix products per token, forward. Not counted are the convolution and the
        recurrence, which multiplies no matrices: some tens of operations per channel and Newton iteration."""
        projections = 3 * self.width**2 if self.block == "full" else 0
        gates = CELLS[self.cell] * self.width**2 / self.heads
        return projections + gates + 3 * self.width * self.hidden_width

    def layer_work(self) -> Mapping[Work, int]:
        """What the layers make a device do, and how many layers each."""
        width, gates, head = self.width, CELLS[self.cell], self.width // self.heads
        # The recurrence reads the gates and writes its states (an LSTM's are two numbers); backwards it reads both and
        # the gradient, and writes the gates'.
        states = 2 if self.cell == "lstm" else 1
        forward, backward = (gates + states) * width, (2 * gates + states + 1) * width
        gate_products = Product("gates", head, gates * head, self.heads, "copies")
        cell = Work((gate_products,), (), (Stream("recurrence", forward, backward, forward, backward),))
        if self.block == "mixer":
            return {cell: self.layers}
        projections = (Product("input and gate", width, width, divided="outputs"),) * 2
        out = Product("mixer, out", width, width, divided="inputs")
        streams = (norm(width), residual(width), convolution(width, self.conv_width), gate(width))
        after = (norm(width), residual(width)) if self.hidden_width else ()
        mixer = Work((*projections, out), (), streams + after)
        return {mixer + cell + feed_forward(width, self.hidden_width): self.layers}

    def division_problems(self, parts: int) -> list[str]:
        """Why the model cannot be divided into so many parts by heads and features; none if it can."""
        if self.block == "mixer" and parts > 1:
            return [
                "block: mixer has no projections around its cell, between which ranks could share channels"
            ]
        return undivided({"heads": self.heads, "mlp_width": self.hidden_width}, parts)

    def swap_problems(self, parts: int) -> list[str]:
        """Why so many ranks cannot exchange positions for channels; none if they can."""
        return undivided({"width": self.width}, parts)

    def summary_problems(self) -> list[Problem]:
        """Settings with which ranks that share rows cannot solve the recurrence by exchanging summaries."""
        return [(f"newton.{key}", message) for key, message in split_problems(self.newton)]

    def problems(self, sequence_length: int) -> list[Problem]:
        """(key, what is wrong and what would be right) of every invalid value, all at once."""
        whole = ("layers", "width", "heads", "vocabulary", "conv_width")
        found = not_positive(self, whole, ("norm_epsilon", "recurrent_clip"))
        choices = {
            "cell": tuple(CELLS),
            "block": ("full", "mixer"),
            "initialisation": ("fan_in", "dclm", "small", "torch"),
        }
        found += unknown_choices(self, choices)
        found += [(f"newton.{key}", message) for key, message in self.newton.problems()]
        if sequence_length < 1:
            found.append(("sequence_length", f"{sequence_length} must be at least 1"))
        if self.mlp_width is not None and self.mlp_width < 0:
            found.append(("mlp_width", f"{self.mlp_width} must be at least 0; 0 leaves the layer out"))
        if self.block == "mixer" and self.mlp_width != 0:
            found.append(("mlp_width", f"block: mixer has no feed-forward layer, {self.mlp_width} must be 0"))
        if self.recurrent_clip is not None and not math.isfinite(self.recurrent_clip):
            found.append(("recurrent_clip", f"{self.recurrent_clip} must be finite, or null for no bound"))
        if min(self.width, self.heads) > 0 and self.width % self.heads != 0:
            right = divisors(self.width)
            found.append(("heads", f"width {self.width} does not divide by {self.heads} heads; use {right}"))
        return found
