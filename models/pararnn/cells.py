"""Recurrent cells as layers: ParaGRU, ParaLSTM, and what a cell of one's own needs.

A cell is an input projection by heads and a recurrence in which no channel sees another. The recurrence of
ParaGRU and ParaLSTM is a fused operation; for a cell of one's own the step function is enough (`StepCell`).

Shape suffixes: B batch, T time, C model width = D channels, H input heads, G gates, N channels of a head,
S numbers of state per channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kernels.newton_rnn import (
    Exchange,
    Solution,
    Solver,
    check_structure,
    gru,
    gru_step,
    lstm,
    lstm_step,
    recurrence,
)
from models.declared import Crossing
from models.initialise import Constant, Normal, Rule, Uniform
from models.pararnn.bound import bounded, saturation
from models.pararnn.projection import project_heads
from models.pararnn.telemetry import Telemetry
from models.sharding import Channels, Part, Split

Weights = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class CellShape:
    """Sizes and options of one cell."""

    width: int
    heads: int
    clip: float | None
    solver: Solver

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Cell(nn.Module, ABC):
    """The input projection, and the weights of every channel's own recurrence.

    `input` is (H, N, G, N): input features, gates and channels of a head. `recurrent` is (G, D), `bias` (G, D).
    A subclass says how many gates it has and how to solve and to step. The numbers of heads and channels are
    read from the tensors, so that a tensor-parallel rank, which holds some of the heads, runs the same code.
    """

    gates: ClassVar[int]
    state_shape: ClassVar[tuple[int, ...]] = ()
    """Of a channel's state: () one number, (2,) two."""
    bounded_names: ClassVar[tuple[str, ...]] = ("recurrent",)
    """The parameters that `clip` bounds."""

    splits: ClassVar[Mapping[str, Split]] = {
        "": Channels({"input": 0, "recurrent": 1, "bias": 1, "peephole": 1})
    }
    crossing = Crossing("solve", ("swap_channels", "summaries"))
    group = "recurrence"
    vectors = frozenset({"recurrent", "peephole", "bias"})
    """One element per channel and gate."""

    def __init__(self, shape: CellShape) -> None:
        super().__init__()
        self.shape = shape
        self.input = nn.Parameter(torch.empty(shape.heads, shape.head_width, self.gates, shape.head_width))
        self.recurrent = nn.Parameter(torch.empty(self.gates, shape.width))
        self.bias = nn.Parameter(torch.empty(self.gates, shape.width))
        self.telemetry = Telemetry()

    def initial_rules(self) -> dict[str, Rule]:
        """The first weights of the paper's language models (section C.1): the input projection Kaiming-uniform,
        recurrent and peephole weights N(0, 1 / channels) within the bound, the bias 0."""
        shape = self.shape
        recurrent: dict[str, Rule] = {
            name: Normal(shape.width**-0.5, limit=shape.clip)
            for name, _ in self.named_parameters(recurse=False)
        }
        return recurrent | {"input": Uniform((3 / shape.head_width) ** 0.5), "bias": Constant(0.0)}

    def bounds(self) -> dict[str, float]:
        return {} if self.shape.clip is None else dict.fromkeys(self.bounded_names, self.shape.clip)

    def take_part(self, part: Part) -> None:
        self.shape = replace(self.shape, width=self.shape.width // part.of, heads=self.shape.heads // part.of)

    def forward(
        self, x_BTC: Tensor, segment_ids_BT: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) to the outputs (B, T, C) and the state after the last position, (B, *state_shape, D).

        state: before the first position, as an earlier call gave it; zeros if None. One position after a state
        takes a step of the recurrence; more are solved at once.
        """
        gates_BTHGN = self.project(x_BTC)
        if state is not None and x_BTC.shape[1] == 1 and segment_ids_BT is None:
            return self._step(gates_BTHGN, state)
        solution = self.solve(gates_BTHGN, self.weights(), state, segment_ids_BT)
        if self.training:
            # Here and not by whoever logs: under ZeRO 3 the weights are whole during the forward pass alone.
            weights = [getattr(self, name) for name in self.bounded_names]
            at_bound = saturation(weights, self.shape.clip)
            self.telemetry.add(solution.report, at_bound)
        return solution.output_BTD, solution.final_state

    def project(self, x_BTC: Tensor) -> Tensor:
        """Each head's input features to its gates, (B, T, H, G, N), without the bias."""
        heads, features, gates, channels = self.input.shape
        x_MHI = x_BTC.reshape(-1, heads, features)
        gates_MHO = project_heads(x_MHI, self.input.reshape(heads, features, gates * channels))
        return gates_MHO.view(*x_BTC.shape[:2], heads, gates, channels)

    def weight(self, parameter: Tensor) -> Tensor:
        """A recurrent weight as the recurrence sees it: within the bound."""
        return bounded(parameter, self.shape.clip)

    def weights(self) -> Weights:
        """The recurrence's own: those of `bounded_names` within the bound, then the bias. All have channels last."""
        return (*(self.weight(getattr(self, name)) for name in self.bounded_names), self.bias)

    @abstractmethod
    def solve(
        self,
        gates_BTHGN: Tensor,
        weights: Weights,
        state: Tensor | None,
        segment_ids_BT: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Solution:
        """All positions of the recurrence, for the channels of `gates` and `weights`.

        exchange: with whoever holds the other parts of the sequences (`kernels.newton_rnn.gru`).
        """

    @abstractmethod
    def step(self, gates_BHGN: Tensor, state: Tensor) -> Tensor:
        """The next state after one position."""

    def output(self, state: Tensor) -> Tensor:
        """The layer's output (B, D) of a state (B, *state_shape, D)."""
        return state[:, -1] if self.state_shape else state

    def new_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """Zeros (B, *state_shape, D), in fp32 or wider: a state is read again and again; rounding would add up."""
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        return torch.zeros(batch, *self.state_shape, self.shape.width, device=device, dtype=wide)

    def _step(self, gates_BTHGN: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.step(gates_BTHGN[:, 0], state)
        return self.output(state)[:, None].to(gates_BTHGN.dtype), state


class ParaGRU(Cell):
    """`kernels.newton_rnn.gru`: gates z, r, s; the state is the output."""

    gates = 3

    def solve(
        self,
        gates_BTHGN: Tensor,
        weights: Weights,
        state: Tensor | None,
        segment_ids_BT: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Solution:
        recurrent_GD, bias_GD = weights
        return gru(
            gates_BTHGN,
            recurrent_GD,
            bias_GD,
            state,
            segment_ids_BT=segment_ids_BT,
            solver=self.shape.solver,
            exchange=exchange,
        )

    def step(self, gates_BHGN: Tensor, state: Tensor) -> Tensor:
        recurrent_GD, bias_GD = self.weights()
        return gru_step(gates_BHGN, recurrent_GD, bias_GD, state)


class ParaLSTM(Cell):
    """`kernels.newton_rnn.lstm`: gates f, o, z with peepholes from the cell's state; state c and output h."""

    gates = 3
    state_shape = (2,)
    bounded_names = ("recurrent", "peephole")

    def __init__(self, shape: CellShape) -> None:
        super().__init__(shape)
        self.peephole = nn.Parameter(torch.empty(2, shape.width))

    def solve(
        self,
        gates_BTHGN: Tensor,
        weights: Weights,
        state: Tensor | None,
        segment_ids_BT: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Solution:
        recurrent_GD, peephole_2D, bias_GD = weights
        return lstm(
            gates_BTHGN,
            recurrent_GD,
            peephole_2D,
            bias_GD,
            state,
            segment_ids_BT=segment_ids_BT,
            solver=self.shape.solver,
            exchange=exchange,
        )

    def step(self, gates_BHGN: Tensor, state: Tensor) -> Tensor:
        recurrent_GD, peephole_2D, bias_GD = self.weights()
        return lstm_step(gates_BHGN, recurrent_GD, peephole_2D, bias_GD, state)


class StepCell(Cell):
    """A cell given by its step function alone; its Jacobian comes from `torch.func`, on any device.

    A subclass gives `gates`, `next_state`, and `project` if its states cannot leave some set. That the step
    mixes no channels is checked when the cell is built.
    """

    def __init__(self, shape: CellShape) -> None:
        super().__init__(shape)
        # Without storage where the model is built on the meta device; only the sizes matter to the check.
        few = min(shape.width, 8)
        with torch.device("cpu"):
            inputs = torch.zeros(self.gates, few)
            check_structure(
                self.next_state, inputs, (torch.full((self.gates, few), 0.3),), structure=self.structure
            )

    @property
    def structure(self) -> Literal["diagonal", "block2"]:
        return "block2" if self.state_shape else "diagonal"

    @staticmethod
    @abstractmethod
    def next_state(inputs_GD: Tensor, weights: tuple[Tensor, ...], state_D: Tensor) -> Tensor:
        """h' from the gates' inputs (..., G, D) with their bias, (recurrent (G, D),), and h (..., D); for a
        state of two numbers h is (..., 2, D)."""

    @staticmethod
    def bring_back(state: Tensor) -> Tensor:
        """Onto the set that no step leaves; the state itself if there is none."""
        return state

    def solve(
        self,
        gates_BTHGN: Tensor,
        weights: Weights,
        state: Tensor | None,
        segment_ids_BT: Tensor | None,
        exchange: Exchange | None = None,
    ) -> Solution:
        inputs_BTGD, recurrent = self._wide(gates_BTHGN, weights)
        solution = recurrence(
            self.next_state,
            inputs_BTGD,
            recurrent,
            state,
            structure=self.structure,
            project=self.bring_back,
            segment_ids_BT=segment_ids_BT,
            solver=self.shape.solver,
            exchange=exchange,
        )
        return replace(solution, output_BTD=solution.output_BTD.to(gates_BTHGN.dtype))

    def step(self, gates_BHGN: Tensor, state: Tensor) -> Tensor:
        return self.next_state(*self._wide(gates_BHGN, self.weights()), state)

    @staticmethod
    def _wide(gates: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        """Gates (..., H, G, N) as inputs (..., G, D) with the bias added, and the other weights; in fp32 or wider."""
        *recurrent, bias = weights
        wide = torch.promote_types(gates.dtype, torch.float32)
        inputs = gates.to(wide).transpose(-3, -2).flatten(-2) + bias
        return inputs, tuple(weight.to(wide) for weight in recurrent)


class Elman(StepCell):
    """`h' = tanh(a h + x + b)`, the least of cells, and the example for one's own."""

    gates = 1

    @staticmethod
    def next_state(inputs_GD: Tensor, weights: tuple[Tensor, ...], state_D: Tensor) -> Tensor:
        (recurrent_GD,) = weights
        return torch.tanh(recurrent_GD[0] * state_D + inputs_GD[..., 0, :])

    @staticmethod
    def bring_back(state: Tensor) -> Tensor:
        return state.clamp(-1.0, 1.0)


CELLS: dict[str, type[Cell]] = {"gru": ParaGRU, "lstm": ParaLSTM, "elman": Elman}
"""By the name that `model.cell` gives it."""
