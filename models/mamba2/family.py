"""The mamba2 family: the linear recurrence that the ParaRNN paper compares with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.family import Family
from models.initialise import Constant, LogOfUniform, Normal, Rule, SoftplusLogUniform, Uniform
from models.layers.language_model import LanguageModel
from models.layers.norm import RMSNorm
from models.mamba2.config import Mamba2Config
from models.mamba2.mixer import Block
from models.sharding import Channels, Column, Row, Shared, Split, Vocab

# The maps b and c are shared by all heads of a group. The gated norm's mean square is over a group's channels: parts
# that hold pieces of one sum over these.
SHARDING: Mapping[str, Split] = {
    "blocks.*.mixer.gate": Column(),
    "blocks.*.mixer.input": Column(),
    "blocks.*.mixer.step": Column(),
    "blocks.*.mixer.maps": Shared(),
    "blocks.*.mixer.maps_conv": Shared(),
    "blocks.*.mixer.conv": Channels({"weight": 0, "bias": 0}),
    "blocks.*.mixer": Channels({"log_rate": 0, "step_bias": 0, "direct": 0}),
    "blocks.*.mixer.norm": Channels({"weight": 0}),
    "blocks.*.mixer.out": Row(),
    "embedding": Vocab(),
    "head": Vocab(),
}

# The ParaRNN paper's settings for it (table 3, section C.1), as for the pararnn family.
RECIPE: Mapping[str, Any] = {
    "lr": 5e-3,
    "matrix_lr_multiplier": 1.0,
    "betas": (0.9, 0.95),
    "epsilon": 1e-8,
    "weight_decay": 5e-7,
    "clip_norm": 1.0,
    "warmup_steps": 5500,
    "schedule": "cosine",
    "final_lr_fraction": 0.0,
}


class Mamba2(LanguageModel):
    """A `LanguageModel` of Mamba-2 blocks."""

    constant_state = True

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(
            vocabulary=config.vocabulary,
            width=config.width,
            blocks=(Block(config) for _ in range(config.layers)),
            norm=RMSNorm(config.width, config.norm_epsilon),
            tied_head=config.tied_head,
        )
        self.config = config

    def initial_rule(self, name: str) -> Rule:
        """How `models.initialise` draws the parameter of this name."""
        return initial_rule(self.config, name)


def parameter_group(name: str) -> str:
    """ "embedding", "recurrence", "norm" or "head": the part of the model a parameter belongs to."""
    parts = name.split(".")
    if "norm" in name:
        return "norm"
    for group, part in (("recurrence", "mixer"), ("embedding", "embedding"), ("head", "head")):
        if part in parts:
            return group
    raise ValueError(f"{name} is no parameter of a Mamba2")


def initial_rule(config: Mamba2Config, name: str) -> Rule:
    """As Mamba-2's authors: rates in 1 ... 16, step sizes in 0.001 ... 0.1; matrices by the config."""
    last = name.rsplit(".", 1)[-1]
    special: dict[str, Rule] = {
        "log_rate": LogOfUniform(1.0, 16.0),
        "step_bias": SoftplusLogUniform(0.001, 0.1),
        "direct": Constant(1.0),
        "bias": Constant(0.0),
    }
    if parameter_group(name) == "norm":
        return Constant(1.0)
    if last in special:
        return special[last]
    if "conv" in name:
        return Uniform(config.conv_width**-0.5)
    returns = name.endswith(".mixer.out.weight")
    fan_in = config.channels if returns else config.width
    if config.initialisation == "torch":
        return Normal(1.0) if name == "embedding.weight" else Uniform(fan_in**-0.5)
    if config.initialisation == "fan_in":
        return Normal(fan_in**-0.5)
    return Normal(0.02 / config.layers**0.5 if returns else 0.02)


def flops_per_token(config: Mamba2Config, sequence_length: int) -> float:
    """Training FLOPs per token: three times the forward's matrix products, at 2 FLOPs per multiply-add.

    Of the state space is counted the recurrence itself (one product with b and one with c per channel), not
    what the chunked form computes besides.
    """
    assert config.vocabulary is not None
    maps = 2 * config.groups * config.state_width
    projections = config.width * (3 * config.channels + maps + config.heads)
    recurrence = 2 * config.channels * config.state_width
    forward = 2 * (config.layers * (projections + recurrence) + config.width * config.vocabulary)
    return 3.0 * forward


mamba2 = Family(
    name="mamba2",
    config=Mamba2Config,
    build=Mamba2,
    sharding=SHARDING,
    flops_per_token=flops_per_token,
    parameter_group=parameter_group,
    recipe=RECIPE,
)
