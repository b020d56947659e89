"""The settings that the attention families share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from models.layers.transfer import Transfer
from models.layers.work import AttentionLayer, Kernel, Work

Problem = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only Transformer.

    `kv_heads` None means one per head; `mlp_width` None means `swiglu_width(width)`; `vocabulary` None means
    that the dataset's tokenizer decides, and must be filled in before the model is built. `positions`: "alibi", "rope"
    with `rope_base`, or "none", where other layers of a hybrid know the order. `layer_scale` is
    the initial value of a learned factor per feature on each branch, or None for no such factor.
    `initialisation`: "fan_in" draws matrices from N(0, 1 / fan_in) and the embedding from N(0, 1 / width);
    "small" draws all from N(0, 0.02^2), the projections back to the residual stream / sqrt(2 layers).
    `transfer`: the smaller model on which the optimizer's settings were tuned; residual branches, initial weights,
    learning rates and epsilons then follow Complete(d)P (`models.layers.transfer`).
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    vocabulary: int | None = None
    mlp_width: int | None = None
    positions: Literal["alibi", "rope", "none"] = "alibi"
    rope_base: float = 10000.0
    qk_norm: bool = True
    norm: Literal["hybrid", "pre"] = "hybrid"
    layer_scale: float | None = None
    tied_head: bool = True
    norm_epsilon: float = 1e-5
    initialisation: Literal["fan_in", "small"] = "fan_in"
    transfer: Transfer | None = None

    causal: ClassVar[bool] = True
    """Whether a token sees those before it only. A family's nature, no setting."""
    row_order: ClassVar[Literal["contiguous", "balanced"]] = "contiguous"
    """How ranks cut the rows that they share. balanced: each takes an early and a late run of positions, for it
    computes its own queries alone, and late ones see more."""

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        return swiglu_width(self.width) if self.mlp_width is None else self.mlp_width

    @property
    def qkv_features(self) -> tuple[int, int, int]:
        """Rows of q, k and v in `attention.qkv`, in this order."""
        keys = self.key_heads * self.head_width
        return self.heads * self.head_width, keys, keys

    def block_products(self, sequence_length: int) -> float:
        """Multiply-adds of a block's matrix products per token, forward: projections, feed-forward, and attention's two
        products, at half the sequence length (the mean of a causal row), or all of it."""
        attention = self.width * (sum(self.qkv_features) + self.qkv_features[0])
        pairs = 2 * self.qkv_features[0] * sequence_length / (2 if self.causal else 1)
        return attention + 3 * self.width * self.hidden_width + pairs

    @property
    def attention_kernel(self) -> Kernel:
        """Which attention a planner reckons with."""
        return "sigmoid attention"

    def layer_work(self) -> Mapping[Work, int]:
        """What the layers make a device do, and how many layers each."""
        layer = AttentionLayer(
            kernel=self.attention_kernel,
            width=self.width,
            heads=self.heads,
            key_heads=self.key_heads,
            hidden=self.hidden_width,
            causal=self.causal,
            rotary=self.positions == "rope",
            qk_norm=self.qk_norm,
            post_norm=self.norm == "hybrid",
            layer_scale=self.layer_scale is not None,
        )
        return {layer.work(): self.layers}

    def division_problems(self, parts: int) -> list[str]:
        """Why the model cannot be divided into so many parts by heads and features; none if it can."""
        return undivided(
            {"heads": self.heads, "kv_heads": self.key_heads, "mlp_width": self.hidden_width}, parts
        )

    def swap_problems(self, parts: int) -> list[str]:
        """Why so many ranks cannot exchange positions for heads, where the model's attention does; none if they can."""
        return []

    def problems(self, sequence_length: int) -> list[Problem]:
        """(key, what is wrong and what would be right) of every invalid value, all at once."""
        whole = ("layers", "width", "heads", "kv_heads", "vocabulary", "mlp_width")
        found = not_positive(self, whole, ("rope_base", "norm_epsilon", "layer_scale"))
        found += unknown_choices(self, CHOICES)
        if sequence_length < 1:
            found.append(("sequence_length", f"{sequence_length} must be at least 1"))
        if min(self.width, self.heads) > 0:
            found += self._head_problems()
        if self.positions != "rope" and self.rope_base != DecoderConfig.rope_base and self.rope_base > 0:
            found.append(("rope_base", f"{self.rope_base} has no effect with positions: {self.positions}"))
        if self.transfer is not None:
            found += self._transfer_problems(self.transfer)
        return found

    def _transfer_problems(self, transfer: Transfer) -> list[Problem]:
        found = [
            (f"transfer.{key}", f"{getattr(transfer, key)} must be at least 1")
            for key in ("width", "layers")
            if getattr(transfer, key) < 1
        ]
        if not 0.5 <= transfer.alpha <= 1:
            found.append(("transfer.alpha", f"{transfer.alpha} must be from 0.5 to 1; both ends transfer"))
        if self.tied_head:
            message = "a tied head cannot have both an embedding's initial weights and a head's; set tied_head: false"
            found.append(("transfer", message))
        return found

    def _head_problems(self) -> list[Problem]:
        found = []
        if self.width % self.heads != 0:
            found.append(
                (
                    "heads",
                    f"width {self.width} does not divide by {self.heads} heads; use {divisors(self.width)}",
                )
            )
        elif self.positions == "rope" and self.head_width % 2 != 0:
            found.append(
                (
                    "heads",
                    f"rope needs an even head width, and width {self.width} / {self.heads} heads = "
                    f"{self.head_width}; use another number of heads, or positions: alibi",
                )
            )
        if self.key_heads > 0 and self.heads % self.key_heads != 0:
            message = (
                f"{self.heads} heads do not divide by {self.key_heads} kv_heads; use {divisors(self.heads)}"
            )
            found.append(("kv_heads", message))
        return found


def swiglu_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256, or of 64 below a width of 768.

    256 is the published recipe's; in a small model it would change the size of the layer by up to a half.
    """
    multiple = 256 if width >= 768 else 64
    return -(-8 * width // (3 * multiple)) * multiple


CHOICES: Mapping[str, Sequence[str]] = {
    "positions": ("alibi", "rope", "none"),
    "norm": ("hybrid", "pre"),
    "initialisation": ("fan_in", "small"),
}


def not_positive(config: object, whole: Sequence[str], numbers: Sequence[str]) -> list[Problem]:
    """The keys among `whole` that are below 1, and those among `numbers` that are not above 0. None is no value."""
    limits = [(key, "at least 1") for key in whole] + [(key, "greater than 0") for key in numbers]
    values = [(key, limit, getattr(config, key)) for key, limit in limits]
    return [
        (key, f"{value} must be {limit}")
        for key, limit, value in values
        if value is not None and not value > 0
    ]


def undivided(sizes: Mapping[str, int], parts: int) -> list[str]:
    """What is wrong with dividing each of these into so many parts, in one sentence, if anything is."""
    wrong = [f"{key} = {size}" for key, size in sizes.items() if size % parts]
    return [f"{' and '.join(wrong)} cannot be divided by {parts}"] if wrong else []


def unknown_choices(config: object, choices: Mapping[str, Sequence[str]]) -> list[Problem]:
    """The keys whose value is not among their choices."""
    return [
        (key, f"{getattr(config, key)!r} is unknown; use {' or '.join(allowed)}")
        for key, allowed in choices.items()
        if getattr(config, key) not in allowed
    ]


def divisors(number: int) -> str:
    """The divisors of a number as text: '1, 2, 3, 4, 6 or 12'; at most the 16 greatest."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    found = [str(d) for d in sorted({*small, *(number // n for n in small)})][-16:]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
