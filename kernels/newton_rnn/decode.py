"""One step of the ParaGRU and ParaLSTM, for decoding: the reference equations on tensors of the ops' shapes.

Shape suffixes: B batch, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.newton_rnn.cells import gru_cell_step, lstm_cell_step


def gru_step(gates_BHGN: Tensor, recurrent_GD: Tensor, bias_GD: Tensor, state_BD: Tensor) -> Tensor:
    """The next state (B, D) in the state's dtype (keep it in fp32). Arguments as for `gru`."""
    parameters = (recurrent_GD.to(state_BD.dtype), bias_GD.to(state_BD.dtype))
    return gru_cell_step(_inputs(gates_BHGN, state_BD.dtype), parameters, state_BD)


def lstm_step(
    gates_BHGN: Tensor, recurrent_GD: Tensor, peephole_2D: Tensor, bias_GD: Tensor, state_B2D: Tensor
) -> Tensor:
    """The next state (B, 2, D), c then h (the layer's output), in the state's dtype. As for `lstm`."""
    dtype = state_B2D.dtype
    parameters = (recurrent_GD.to(dtype), peephole_2D.to(dtype), bias_GD.to(dtype))
    return lstm_cell_step(_inputs(gates_BHGN, dtype), parameters, state_B2D)


def _inputs(gates_BHGN: Tensor, dtype: torch.dtype) -> Tensor:
    return gates_BHGN.to(dtype).transpose(-3, -2).flatten(-2)
