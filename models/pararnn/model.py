"""The ParaRNN language model: its blocks, its first weights, and the names of its parts."""

from __future__ import annotations

from torch import nn

from models.initialise import Constant, Normal, Rule, Uniform
from models.layers.language_model import LanguageModel
from models.layers.norm import RMSNorm
from models.pararnn.cells import Cell, initial_cell_rule
from models.pararnn.config import ParaRNNConfig
from models.pararnn.mixer import Block, MixerBlock, cell_shape


class ParaRNN(LanguageModel):
    """A `LanguageModel` of recurrent blocks. With `block: mixer` there is no norm before the head."""

    constant_state = True

    def __init__(self, config: ParaRNNConfig) -> None:
        full = config.block == "full"
        super().__init__(
            vocabulary=config.vocabulary,
            width=config.width,
            blocks=(Block(config) if full else MixerBlock(config) for _ in range(config.layers)),
            norm=RMSNorm(config.width, config.norm_epsilon) if full else nn.Identity(),
            tied_head=config.tied_head,
        )
        self.config = config

    def initial_rule(self, name: str) -> Rule:
        """How `models.initialise` draws the parameter of this name."""
        return initial_rule(self.config, name)

    def bounds(self) -> dict[str, float]:
        """The recurrent and peephole weights within `recurrent_clip`."""
        limit = self.config.recurrent_clip
        if limit is None:
            return {}
        cells = self.cells()
        return {f"{cell}.{name}": limit for cell in cells for name in cells[cell].bounded_names}

    def cells(self) -> dict[str, Cell]:
        """The recurrences by their modules' names, first layer first."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Cell)}


def parameter_group(name: str) -> str:
    """ "embedding", "recurrence", "mlp", "norm" or "head": the part of the model a parameter belongs to."""
    parts = name.split(".")
    if "norm" in name or parts[-1] == "skip":
        return "norm"
    if "mixer" in parts or "cell" in parts:
        return "recurrence"
    for group in ("mlp", "embedding", "head"):
        if group in parts:
            return group
    raise ValueError(f"{name} is no parameter of a ParaRNN")


def initial_rule(config: ParaRNNConfig, name: str) -> Rule:
    """Norms and the skip's factor start at one, cells as the paper's, other matrices by the config."""
    parts = name.split(".")
    if parameter_group(name) == "norm":
        return Constant(1.0)
    if "cell" in parts:
        return initial_cell_rule(cell_shape(config), parts[-1])
    if "conv" in parts:
        return Constant(0.0) if parts[-1] == "bias" else Uniform(config.conv_width**-0.5)
    fan_in = config.hidden_width if name.endswith(".mlp.down.weight") else config.width
    if config.initialisation == "torch":
        return Normal(1.0) if name == "embedding.weight" else Uniform(fan_in**-0.5)
    if config.initialisation == "fan_in":
        return Normal(fan_in**-0.5)
    returns = name.endswith((".mixer.out.weight", ".mlp.down.weight"))
    if config.initialisation == "dclm":
        # Source: open_lm, which DCLM trains with: `reset_parameters` of its attention, block and model.
        deviation = (fan_in * 2 * (int(parts[1]) + 1)) ** -0.5 if returns else fan_in**-0.5
        return Normal(deviation, limit=3 * deviation)
    branches = config.layers * (2 if config.hidden_width else 1)
    return Normal(0.02 / branches**0.5 if returns else 0.02)
