"""The equations of the ParaGRU and ParaLSTM cells, their Jacobians, and their pullbacks, in plain torch.

    ParaGRU    z = sigmoid(a_z h + x_z + b_z)      r = sigmoid(a_r h + x_r + b_r)
               s = tanh(a_s (r h) + x_s + b_s)     h' = (1 - z) h + z s
    ParaLSTM   f = sigmoid(a_f h + c_f c + x_f + b_f)    z = tanh(a_z h + x_z + b_z)
               c' = f c + (1 - f) z
               o = sigmoid(a_o h + c_o c' + x_o + b_o)   h' = o tanh(c')

All products are elementwise: no channel sees another, so the Jacobian of a step is one number per channel
for the GRU and a 2x2 matrix for the LSTM. Since h' is a mean of h and s in [-1, 1], and c' of c and z, the
states never leave |h| <= 1 (GRU) and |c| <= 1, |h| <= tanh 1 (LSTM).
Source: Danieli et al., "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for LLMs", eq. 3.1-3.3.

Shape suffixes: G gates (GRU z, r, s; LSTM f, o, z), D channels; further dimensions lead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Parameters = tuple[Tensor, ...]
Structure = Literal["diagonal", "block2"]
Step = Callable[[Tensor, Parameters, Tensor], Tensor]
Jacobian = Callable[[Tensor, Parameters, Tensor], Tensor]
Linearisation = Callable[[Tensor, Parameters, Tensor], tuple[Tensor, Tensor]]
Projection = Callable[[Tensor], Tensor]

LSTM_OUTPUT_BOUND = math.tanh(1.0)


@dataclass(frozen=True)
class Cell:
    """A recurrence's step with what Newton's method asks of it.

    step: (inputs (..., D) or (..., G, D), parameters, state) -> next state, for any leading dimensions.
    structure: "diagonal", states (..., D), Jacobian (..., D); "block2", states (..., 2, D), Jacobian
        (..., 2, 2, D) as row (of the next state), column (of the state), channel.
    linearise: as step, but returns the next state and the Jacobian.
    project: onto a convex set that no step leaves, elementwise; None if there is none.
    """

    step: Step
    structure: Structure
    linearise: Linearisation
    project: Projection | None

    @property
    def block(self) -> bool:
        return self.structure == "block2"


@dataclass(frozen=True)
class Pullback:
    """Gradients through one step: of the inputs (..., G, D), and of each parameter before the sum over the
    leading dimensions.
    """

    inputs: Tensor
    parameters: Parameters


def gru_gates(inputs_GD: Tensor, parameters: Parameters, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, r, s."""
    recurrent_GD, bias_GD = parameters
    x_z, x_r, x_s = (inputs_GD + bias_GD).unbind(-2)
    a_z, a_r, a_s = recurrent_GD.unbind(-2)
    z, r = torch.sigmoid(a_z * h + x_z), torch.sigmoid(a_r * h + x_r)
    return z, r, torch.tanh(a_s * (r * h) + x_s)


def gru_cell_step(inputs_GD: Tensor, parameters: Parameters, h: Tensor) -> Tensor:
    z, _, s = gru_gates(inputs_GD, parameters, h)
    return h + z * (s - h)


def gru_linearise(inputs_GD: Tensor, parameters: Parameters, h: Tensor) -> tuple[Tensor, Tensor]:
    z, r, s = gru_gates(inputs_GD, parameters, h)
    a_z, a_r, a_s = parameters[0].unbind(-2)
    jacobian = (1 - z) + (s - h) * z * (1 - z) * a_z + z * (1 - s * s) * a_s * (r + h * r * (1 - r) * a_r)
    return h + z * (s - h), jacobian


def gru_pullback(inputs_GD: Tensor, parameters: Parameters, h: Tensor, grad: Tensor) -> Pullback:
    """grad: of the next state, (..., D)."""
    z, r, s = gru_gates(inputs_GD, parameters, h)
    d_z = grad * (s - h) * z * (1 - z)
    d_s = grad * z * (1 - s * s)
    d_r = d_s * parameters[0][2] * h * r * (1 - r)
    inputs = torch.stack([d_z, d_r, d_s], -2)
    recurrent = torch.stack([d_z * h, d_r * h, d_s * h * r], -2)
    return Pullback(inputs, (recurrent, inputs))


def gru_project(h: Tensor) -> Tensor:
    return h.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class LstmGates:
    f: Tensor
    o: Tensor
    z: Tensor
    c: Tensor  # the new cell state
    tanh_c: Tensor


def lstm_gates(inputs_GD: Tensor, parameters: Parameters, state_2D: Tensor) -> LstmGates:
    recurrent_GD, peephole_2D, bias_GD = parameters
    x_f, x_o, x_z = (inputs_GD + bias_GD).unbind(-2)
    a_f, a_o, a_z = recurrent_GD.unbind(-2)
    c_f, c_o = peephole_2D.unbind(-2)
    c, h = state_2D.unbind(-2)
    f, z = torch.sigmoid(a_f * h + c_f * c + x_f), torch.tanh(a_z * h + x_z)
    new_c = z + f * (c - z)
    o = torch.sigmoid(a_o * h + c_o * new_c + x_o)
    return LstmGates(f, o, z, new_c, torch.tanh(new_c))


def lstm_cell_step(inputs_GD: Tensor, parameters: Parameters, state_2D: Tensor) -> Tensor:
    gates = lstm_gates(inputs_GD, parameters, state_2D)
    return torch.stack([gates.c, gates.o * gates.tanh_c], -2)


def lstm_linearise(inputs_GD: Tensor, parameters: Parameters, state_2D: Tensor) -> tuple[Tensor, Tensor]:
    gates = lstm_gates(inputs_GD, parameters, state_2D)
    f, o, z, tanh_c = gates.f, gates.o, gates.z, gates.tanh_c
    a_f, a_o, a_z = parameters[0].unbind(-2)
    c_f, c_o = parameters[1].unbind(-2)
    d_f = (state_2D[..., 0, :] - z) * f * (1 - f)
    d_o = tanh_c * o * (1 - o)
    h_by_c = d_o * c_o + o * (1 - tanh_c * tanh_c)
    cc, ch = f + d_f * c_f, d_f * a_f + (1 - f) * (1 - z * z) * a_z
    rows = [torch.stack([cc, ch], -2), torch.stack([h_by_c * cc, h_by_c * ch + d_o * a_o], -2)]
    return torch.stack([gates.c, o * tanh_c], -2), torch.stack(rows, -3)


def lstm_pullback(inputs_GD: Tensor, parameters: Parameters, state_2D: Tensor, grad_2D: Tensor) -> Pullback:
    """grad: of the next state, (..., 2, D)."""
    gates = lstm_gates(inputs_GD, parameters, state_2D)
    f, o, z, tanh_c = gates.f, gates.o, gates.z, gates.tanh_c
    c, h = state_2D.unbind(-2)
    d_o = grad_2D[..., 1, :] * tanh_c * o * (1 - o)
    d_c = grad_2D[..., 0, :] + grad_2D[..., 1, :] * o * (1 - tanh_c * tanh_c) + d_o * parameters[1][1]
    d_f = d_c * (c - z) * f * (1 - f)
    inputs = torch.stack([d_f, d_o, d_c * (1 - f) * (1 - z * z)], -2)
    peephole = torch.stack([d_f * c, d_o * gates.c], -2)
    return Pullback(inputs, (inputs * h.unsqueeze(-2), peephole, inputs))


def lstm_project(state_2D: Tensor) -> Tensor:
    c, h = state_2D.unbind(-2)
    bounded = h.clamp(-LSTM_OUTPUT_BOUND, LSTM_OUTPUT_BOUND)
    return torch.stack([c.clamp(-1.0, 1.0), bounded], -2)


GRU = Cell(gru_cell_step, "diagonal", gru_linearise, gru_project)
LSTM = Cell(lstm_cell_step, "block2", lstm_linearise, lstm_project)
