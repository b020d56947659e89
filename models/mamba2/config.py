"""Settings of the Mamba-2 family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from models.layers.config import Problem, divisors, not_positive, undivided, unknown_choices
from models.layers.work import Fused, Product, Stream, Work, convolution, gate, norm, residual

CHOICES = {
    "initialisation": ("fan_in", "small", "torch"),
    "kernel": ("auto", "torch", "mamba_ssm"),
    "gated_norm": ("groups", "channels"),
}


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """A Mamba-2 language model, the baseline of the ParaRNN family.

    The state-space layer has `expand` times the width in channels, divided over `heads`, and a state of
    `state_width` numbers per channel; `groups` of heads share their input and output maps. `gated_norm`: over the
    channels of each group by itself, as its authors have it, or over all "channels" together, as models of several
    groups were trained here before. `chunk` positions are computed at once. `kernel`: "mamba_ssm" takes that
    package's, "torch" the plain form, "auto" the former on a GPU where it is installed. `initialisation` as in the
    pararnn family.
    """

    causal: ClassVar[bool] = True
    row_order: ClassVar[Literal["contiguous", "balanced"]] = "contiguous"

    family: Literal["mamba2"] = "mamba2"
    layers: int
    width: int
    heads: int
    vocabulary: int | None = None
    expand: int = 2
    state_width: int = 128
    groups: int = 1
    gated_norm: Literal["groups", "channels"] = "groups"
    conv_width: int = 4
    chunk: int = 128
    kernel: Literal["auto", "torch", "mamba_ssm"] = "auto"
    tied_head: bool = False
    norm_epsilon: float = 1e-5
    initialisation: Literal["fan_in", "small", "torch"] = "fan_in"

    @property
    def channels(self) -> int:
        return self.expand * self.width

    @property
    def norm_groups(self) -> int:
        """How many runs of channels the gated norm takes by themselves."""
        return self.groups if self.gated_norm == "groups" else 1

    @property
    def head_width(self) -> int:
        return self.channels // self.heads

    def resolved(self, *, vocabulary: int, sequence_length: int) -> Mamba2Config:
        """The same settings with the vocabulary filled in where it was None."""
        return replace(self, vocabulary=vocabulary if self.vocabulary is None else self.vocabulary)

    def block_products(self, sequence_length: int) -> float:
        """Multiply-adds of a block's matrix products per token, forward. Of the state space is counted the recurrence
        itself (one product with b and one with c per channel), not what the chunked form computes besides."""
        maps = 2 * self.groups * self.state_width
        projections = self.width * (3 * self.channels + maps + self.heads)
        return projections + 2 * self.channels * self.state_width

    def layer_work(self) -> Mapping[Work, int]:
        """What the layers make a device do, and how many layers each."""
        width, channels, state = self.width, self.channels, self.state_width
        maps = 2 * self.groups * state
        into = (Product("input and gate", width, channels, divided="outputs"),) * 2
        shared = Product("maps and steps", width, maps + self.heads)
        out = Product("mixer, out", channels, width, divided="inputs")
        # Pairs of a chunk's positions, half of them: b with c per head, and those with x. Between chunks: states from x
        # and b, outputs from states and c.
        pairs = self.chunk / 2 * (self.heads * state + channels)
        scan = Fused("state space", per_position=pairs + 2 * channels * state, head_width=self.head_width)
        # x, b, c, the steps in and y out; a state per chunk in fp32, written and read.
        moved = 2 * channels + maps + self.heads + 4 * channels * state / self.chunk
        streams = (
            norm(width),
            residual(width),
            convolution(channels, self.conv_width),
            convolution(maps, self.conv_width),
            Stream("state space", moved, 2 * moved, moved, 2 * moved),
            Stream("direct path", 3 * channels, 5 * channels, 0, 0),
            gate(channels),
        )
        return {Work((*into, shared, out), (scan,), streams): self.layers}

    def division_problems(self, parts: int) -> list[str]:
        """Why the model cannot be divided into so many parts by heads; none if it can."""
        found = undivided({"heads": self.heads}, parts)
        if not found and self.groups % parts and parts % self.groups:
            found.append(
                f"a part of {self.heads // parts} heads would hold parts of the {self.groups} groups"
            )
        return found

    def swap_problems(self, parts: int) -> list[str]:
        """Why so many ranks cannot exchange positions for heads; none if they can."""
        return self.division_problems(parts)

    def problems(self, sequence_length: int) -> list[Problem]:
        """(key, what is wrong and what would be right) of every invalid value, all at once."""
        whole = ("layers", "width", "heads", "vocabulary", "expand", "state_width", "groups")
        found = not_positive(self, (*whole, "conv_width", "chunk"), ("norm_epsilon",))
        found += unknown_choices(self, CHOICES)
        if sequence_length < 1:
            found.append(("sequence_length", f"{sequence_length} must be at least 1"))
        if min(self.width, self.heads, self.expand) > 0 and self.channels % self.heads != 0:
            right = divisors(self.channels)
            message = f"{self.channels} channels do not divide by {self.heads} heads; use {right}"
            found.append(("heads", message))
        if min(self.heads, self.groups) > 0 and self.heads % self.groups != 0:
            message = f"{self.heads} heads do not divide by {self.groups} groups; use {divisors(self.heads)}"
            found.append(("groups", message))
        return found
