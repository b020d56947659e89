"""What a layer of a hybrid may be, as settings: one dataclass per mixer, and what each says for layouts and costs.

Imports no torch. A mixer's class, beside its code, says the rest (`models.declared`).

A mixer of one's own is one class of settings and one module:

    @dataclass(frozen=True, kw_only=True)
    class MyMixer(MixerSettings):
        mixer: ClassVar[str] = "my_package.my_module:MyMixerModule"
        heads: int

and a line in `models.hybrid.config.HybridConfig`, or, outside of this package, its `module:Class` in `model.mixers` and
its settings in `model.own`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, cast

from models.layers.config import Problem, undivided
from models.layers.work import Fused, Product, Work, feed_forward, norm, residual
from models.mamba2.config import Mamba2Config
from models.pararnn.config import NewtonConfig, ParaRNNConfig
from models.sigmoid.config import SigmoidConfig
from models.softmax.config import SoftmaxConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all layers of a hybrid share."""

    layers: int
    width: int
    hidden_width: int
    """Of the feed-forward layer after a mixer; 0 is none."""
    norm_epsilon: float


@dataclass(frozen=True, kw_only=True)
class MixerSettings:
    """The settings of one kind of mixer. A subclass says, beside them:

    mixer: "module:Class" of the module that mixes, made with (settings, shape), and called as `models.hybrid.block`
        has it.
    ways: how ranks that share rows can work together where its positions meet (`models.declared.Way`); with none, a
        layout with parallel.context above 1 is refused.

    and gives `products`, and `division_problems` where its weights can be divided.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    mixer: ClassVar[str]
    ways: ClassVar[tuple[str, ...]] = ()
    reach: ClassVar[int] = 0
    """How many positions back a convolution looks."""
    has_mlp: ClassVar[bool] = True
    """Whether a feed-forward layer follows, where the model has them."""

    def problems(self, shape: Shape, sequence_length: int) -> list[Problem]:
        """(key, what is wrong and what would be right) of every invalid value."""
        return []

    def products(self, shape: Shape, sequence_length: int) -> float:
        """Multiply-adds of the mixer's matrix products per token, forward."""
        raise NotImplementedError(f"{type(self).__name__} gives no `products`, by which its cost is counted")

    def division_problems(self, shape: Shape, parts: int) -> list[str]:
        """Why the mixer cannot be divided into so many parts; none if it can."""
        return (
            [f"{type(self).__name__} does not say how it is divided (division_problems)"] if parts > 1 else []
        )

    def swap_problems(self, shape: Shape, parts: int) -> list[str]:
        """Why so many ranks cannot exchange positions for heads or channels; none if they can."""
        if self.ways or parts == 1:
            return []
        return [f"{type(self).__name__} does not say how its positions meet across ranks (ways)"]

    def block_products(self, shape: Shape, sequence_length: int) -> float:
        """Of the whole layer."""
        return self.products(shape, sequence_length) + 3 * shape.width * shape.hidden_width

    def layer_work(self, shape: Shape) -> Work:
        """What the whole layer makes a device do. Of a mixer of one's own: its products as one matrix's, what grows
        with the row as attention's, and the layer's norms and sums."""
        one, two = self.products(shape, 1), self.products(shape, 2)
        mixing = Product("mixer", shape.width, (2 * one - two) / shape.width)
        over_keys = (Fused("softmax attention", per_key=2 * (two - one)),) if two > one else ()
        streams = (norm(shape.width), residual(shape.width)) * (2 if shape.hidden_width else 1)
        return Work((mixing,), over_keys, streams) + feed_forward(shape.width, shape.hidden_width)

    def resolved(self, sequence_length: int) -> MixerSettings:
        """With what depends on the training length filled in."""
        return self


@dataclass(frozen=True, kw_only=True)
class FamilyMixer(MixerSettings):
    """A mixer of a family of its own: its layer is that family's block, with that family's checks.

    block: "module:function" from the family's config to a block.
    """

    mixer: ClassVar[str] = ""
    block: ClassVar[str]
    family: ClassVar[type]
    fixed: ClassVar[dict[str, Any]] = {}
    """Settings of the family's config that this mixer does not leave open."""

    def config(self, shape: Shape) -> Any:
        """The family's, with these settings."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        shared = {
            "layers": shape.layers,
            "width": shape.width,
            "norm_epsilon": shape.norm_epsilon,
            "vocabulary": 1,
        }
        if self.has_mlp:
            shared["mlp_width"] = shape.hidden_width
        return self.family(**shared, **self.fixed, **own)

    def problems(self, shape: Shape, sequence_length: int) -> list[Problem]:
        found: list[Problem] = self.config(shape).problems(sequence_length)
        return found

    def division_problems(self, shape: Shape, parts: int) -> list[str]:
        found: list[str] = self.config(shape).division_problems(parts)
        return found

    def swap_problems(self, shape: Shape, parts: int) -> list[str]:
        found: list[str] = self.config(shape).swap_problems(parts)
        return found

    def block_products(self, shape: Shape, sequence_length: int) -> float:
        return float(self.config(shape).block_products(sequence_length))

    def layer_work(self, shape: Shape) -> Work:
        (work,) = self.config(shape).layer_work()
        return cast(Work, work)


@dataclass(frozen=True, kw_only=True)
class AttentionMixer(FamilyMixer):
    """`positions: none` where recurrent layers know the order. `norm`, `layer_scale`: of both branches of the layer."""

    block: ClassVar[str] = "models.hybrid.family:attention_block"

    heads: int
    kv_heads: int | None = None
    positions: Literal["alibi", "rope", "none"] = "none"
    rope_base: float = 10000.0
    qk_norm: bool = True
    norm: Literal["hybrid", "pre"] = "pre"
    layer_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class SigmoidMixer(AttentionMixer):
    """`attention_bias`: None means -ln(training sequence length), resolved once and kept."""

    family: ClassVar[type] = SigmoidConfig
    ways: ClassVar[tuple[str, ...]] = ("gather",)

    attention_bias: float | None = None

    def resolved(self, sequence_length: int) -> MixerSettings:
        return (
            replace(self, attention_bias=-math.log(sequence_length)) if self.attention_bias is None else self
        )


@dataclass(frozen=True, kw_only=True)
class SoftmaxMixer(AttentionMixer):
    family: ClassVar[type] = SoftmaxConfig
    ways: ClassVar[tuple[str, ...]] = ("swap",)


@dataclass(frozen=True, kw_only=True)
class RecurrentMixer(FamilyMixer):
    """A nonlinear recurrence; the settings are the pararnn family's."""

    family: ClassVar[type] = ParaRNNConfig
    block: ClassVar[str] = "models.pararnn.mixer:Block"
    ways: ClassVar[tuple[str, ...]] = ("swap_channels", "summaries")

    heads: int = 4
    conv_width: int = 4
    recurrent_clip: float | None = 0.5
    newton: NewtonConfig = field(default_factory=NewtonConfig)

    @property
    def reach(self) -> int:  # type: ignore[override]  # a setting here
        return self.conv_width - 1


@dataclass(frozen=True, kw_only=True)
class GRUMixer(RecurrentMixer):
    fixed: ClassVar[dict[str, Any]] = {"cell": "gru"}


@dataclass(frozen=True, kw_only=True)
class LSTMMixer(RecurrentMixer):
    fixed: ClassVar[dict[str, Any]] = {"cell": "lstm"}


@dataclass(frozen=True, kw_only=True)
class Mamba2Mixer(FamilyMixer):
    """The settings are the mamba2 family's. Its layer has no feed-forward part."""

    family: ClassVar[type] = Mamba2Config
    block: ClassVar[str] = "models.mamba2.mixer:Block"
    ways: ClassVar[tuple[str, ...]] = ("swap_state",)
    has_mlp: ClassVar[bool] = False

    heads: int
    expand: int = 2
    state_width: int = 128
    groups: int = 1
    conv_width: int = 4
    chunk: int = 128
    kernel: Literal["auto", "torch", "mamba_ssm"] = "auto"

    @property
    def reach(self) -> int:  # type: ignore[override]  # a setting here
        return self.conv_width - 1


def divided(shape: Shape, sizes: dict[str, int], parts: int) -> list[str]:
    """What `division_problems` of a mixer by heads gives: these and the feed-forward layer must divide."""
    return undivided({**sizes, "mlp_width": shape.hidden_width}, parts)
