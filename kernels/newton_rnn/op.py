"""The public gru and lstm: one torch custom op with its gradient, which picks the form by device and shape.

Shape suffixes: B batch, T time, H input heads, G gates, N channels of a head, D = H N channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.newton_rnn.cells import GRU, LSTM
from kernels.newton_rnn.forms import backward, forward
from kernels.newton_rnn.solver import Report, Solution, Solver
from kernels.newton_rnn.split import Exchange, split_recurrence
from kernels.newton_rnn.torch_forms import Call
from kernels.ops import operator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gru(
    gates_BTHGN: Tensor,
    recurrent_GD: Tensor,
    bias_GD: Tensor,
    state_BD: Tensor | None = None,
    *,
    segment_ids_BT: Tensor | None = None,
    solver: Solver | None = None,
    exchange: Exchange | None = None,
) -> Solution:
    """The ParaGRU over a sequence: h_t for every t. The equations are in `kernels.newton_rnn.cells`.

    Args:
        gates_BTHGN: (B, T, H, 3, N), the input projections of the gates z, r, s without bias; channel
            d = h N + n of head h. fp64, fp32, bf16 or fp16.
        recurrent_GD: (3, D), the recurrent weights of z, r, s.
        bias_GD: (3, D).
        state_BD: (B, D), the state before position 0, with |h| <= 1; zeros if None.
        segment_ids_BT: (B, T) integers. A position whose id differs from that of the position before starts
            from a state of zeros; the initial state belongs to position 0.
        solver: how to solve; `Solver()` if None.
        exchange: the T positions are a part of longer sequences, whose other parts others hold; None: they are all.
            Segment ids are those of the whole sequences then (see `kernels.newton_rnn.split`).

    Returns a Solution whose output is in the gates' dtype. Everything is computed in fp32 (fp64 for fp64
    gates); gradients flow to gates, weights, bias and state, from the output and from the final state.
    Raises ValueError naming the argument and what it may be.
    """
    return _solve(gates_BTHGN, (recurrent_GD, None, bias_GD), state_BD, segment_ids_BT, solver, exchange)


def lstm(
    gates_BTHGN: Tensor,
    recurrent_GD: Tensor,
    peephole_2D: Tensor,
    bias_GD: Tensor,
    state_B2D: Tensor | None = None,
    *,
    segment_ids_BT: Tensor | None = None,
    solver: Solver | None = None,
    exchange: Exchange | None = None,
) -> Solution:
    """The ParaLSTM over a sequence: h_t for every t. As `gru`, with the gates f, o, z.

    Args:
        peephole_2D: (2, D), the weights c_f and c_o of the cell state in the gates f and o.
        state_B2D: (B, 2, D), c then h, with |c| <= 1 and |h| <= tanh 1.
    """
    return _solve(
        gates_BTHGN, (recurrent_GD, peephole_2D, bias_GD), state_B2D, segment_ids_BT, solver, exchange
    )


def _solve(
    gates: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor],
    state: Tensor | None,
    segment_ids: Tensor | None,
    solver: Solver | None,
    exchange: Exchange | None,
) -> Solution:
    solver = Solver() if solver is None else solver
    for key, message in solver.problems():
        raise ValueError(f"solver.{key} {message}")
    _check_gates(gates)
    _check_parameters(gates, parameters)
    _check_state(gates, state, blocks=parameters[1] is not None)
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32
    if exchange is not None:
        given = tuple(p.to(work) for p in parameters if p is not None)
        inputs_BTGD = gates.to(work).permute(0, 1, 3, 2, 4).flatten(3)
        cell = GRU if parameters[1] is None else LSTM
        solution = split_recurrence(cell, inputs_BTGD, given, state, segment_ids, solver, exchange)
        return replace(solution, output_BTD=solution.output_BTD.to(gates.dtype))
    check_segment_ids(segment_ids, gates, "gates")
    batch, width = gates.shape[0], gates.shape[2] * gates.shape[4]
    if state is None:
        shape = (batch, width) if parameters[1] is None else (batch, 2, width)
        state = gates.new_zeros(shape, dtype=work)
    recurrent, peephole, bias = (None if p is None else p.to(work) for p in parameters)
    output, _, final, numbers = _newton_rnn(
        gates, recurrent, peephole, bias, state.to(work), segment_ids, solver.packed()
    )
    return Solution(output, final, Report.of(numbers, solver))


@operator("triptych::newton_rnn")
def _newton_rnn(
    gates: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    bias: Tensor,
    state: Tensor,
    segment_ids: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the LSTM's cell states (empty for the GRU), the final state, and the report's numbers."""
    call = _call(gates, [recurrent, peephole, bias], state, segment_ids, settings)
    _check_invariant(call)
    result = forward(call)
    cells = gates.new_empty(0) if result.cells_BTD is None else result.cells_BTD
    return result.output_BTD, cells, result.final_state.clone(), result.numbers


@operator("triptych::newton_rnn_backward")
def _newton_rnn_backward(
    grads: list[Tensor],
    states: list[Tensor],
    gates: Tensor,
    parameters: list[Tensor],
    state: Tensor,
    segment_ids: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, recurrent, peephole (empty for the GRU), bias and state.

    grads: of the output and of the final state. states: the output and the cell states.
    """
    recurrent, *peephole, bias = parameters
    call = _call(gates, [recurrent, *peephole, bias], state, segment_ids, settings)
    output, cells = states
    result = backward(call, output, cells if call.lstm else None, grads[0], grads[1])
    d_recurrent, *d_peephole, d_bias = result.parameters
    d_peephole_2D = d_peephole[0] if d_peephole else recurrent.new_empty(0)
    return result.gates_BTHGN, d_recurrent, d_peephole_2D, d_bias, result.state.contiguous()


def _call(
    gates: Tensor,
    parameters: list[Tensor | None],
    state: Tensor,
    segment_ids: Tensor | None,
    settings: list[float],
) -> Call:
    given = tuple(parameter.contiguous() for parameter in parameters if parameter is not None)
    ids = None if segment_ids is None else segment_ids.contiguous()
    return Call(gates.contiguous(), given, state.contiguous(), ids, Solver.unpacked(settings))


@_newton_rnn.register_fake
def _(
    gates: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    bias: Tensor,
    state: Tensor,
    segment_ids: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (gates.shape[0], gates.shape[1], gates.shape[2] * gates.shape[4])
    cells = gates.new_empty(0 if peephole is None else shape)
    numbers = gates.new_empty(5, dtype=torch.float32)
    return gates.new_empty(shape), cells, state.new_empty(state.shape), numbers


@_newton_rnn_backward.register_fake
def _(
    grads: list[Tensor],
    states: list[Tensor],
    gates: Tensor,
    parameters: list[Tensor],
    state: Tensor,
    segment_ids: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    recurrent, *peephole, bias = parameters
    d_peephole = recurrent.new_empty(peephole[0].shape if peephole else 0)
    empties = (recurrent.new_empty(recurrent.shape), d_peephole, bias.new_empty(bias.shape))
    return gates.new_empty(gates.shape), *empties, state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gates, recurrent, peephole, bias, state, segment_ids, settings = inputs
    ctx.save_for_backward(gates, recurrent, peephole, bias, state, segment_ids, output[0], output[1])
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_cells: None, grad_final: Tensor | None, grad_numbers: None
) -> tuple[Tensor | None, ...]:
    gates, recurrent, peephole, bias, state, segment_ids, output, cells = ctx.saved_tensors
    grad = torch.zeros_like(output) if grad is None else grad
    grad_final = torch.zeros_like(state) if grad_final is None else grad_final
    parameters = [recurrent, bias] if peephole is None else [recurrent, peephole, bias]
    d_gates, d_recurrent, d_peephole, d_bias, d_state = _newton_rnn_backward(
        [grad, grad_final], [output, cells], gates, parameters, state, segment_ids, ctx.settings
    )
    d_peephole = None if peephole is None else d_peephole
    return d_gates, d_recurrent, d_peephole, d_bias, d_state, None, None


_newton_rnn.register_autograd(_differentiate, setup_context=_setup_context)


def _check_gates(gates: Tensor) -> None:
    if gates.dim() != 5 or gates.shape[3] != 3:
        raise ValueError(
            f"gates must be (batch, time, heads, 3 gates, channels of a head), got shape {tuple(gates.shape)}"
        )
    if gates.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"gates must be one of {names}, got {gates.dtype}")
    if 0 in gates.shape:
        raise ValueError(
            f"gates has a size of 0 (a sequence of length 0?): its shape is {tuple(gates.shape)}"
        )


def _check_parameters(gates: Tensor, parameters: tuple[Tensor, Tensor | None, Tensor]) -> None:
    width = gates.shape[2] * gates.shape[4]
    rows = {"recurrent": 3, "peephole": 2, "bias": 3}
    for (name, count), parameter in zip(rows.items(), parameters, strict=True):
        if parameter is None:
            continue
        if parameter.shape != (count, width):
            raise ValueError(f"{name} must be ({count}, {width}), by gates; got {tuple(parameter.shape)}")
        if parameter.device != gates.device:
            raise ValueError(f"{name} must be on gates' device {gates.device}, got {parameter.device}")


def _check_state(gates: Tensor, state: Tensor | None, *, blocks: bool) -> None:
    if state is None:
        return
    batch, width = gates.shape[0], gates.shape[2] * gates.shape[4]
    expected = (batch, 2, width) if blocks else (batch, width)
    if state.shape != expected:
        raise ValueError(
            f"state must be {expected}, for the {batch} rows of gates; got {tuple(state.shape)}: pass the state "
            "that belongs to these rows"
        )
    if state.device != gates.device:
        raise ValueError(f"state must be on gates' device {gates.device}, got {state.device}")


def check_segment_ids(segment_ids: Tensor | None, inputs: Tensor, name: str) -> None:
    """Raise ValueError unless `segment_ids` is None or integers (B, T) beside `inputs` (B, T, ...)."""
    if segment_ids is None:
        return
    if segment_ids.shape != inputs.shape[:2]:
        raise ValueError(
            f"segment_ids must be {tuple(inputs.shape[:2])}, one id per position of {name}; "
            f"got {tuple(segment_ids.shape)}"
        )
    if segment_ids.device != inputs.device:
        raise ValueError(f"segment_ids must be on {name}' device {inputs.device}, got {segment_ids.device}")
    if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")


def _check_invariant(call: Call) -> None:
    """On a CPU an initial state that iterates would be projected away from is refused at once."""
    if not call.solver.project or call.state.device.type != "cpu":
        return
    assert call.cell.project is not None
    excess = float((call.state - call.cell.project(call.state)).abs().max())
    if excess > call.slack:
        bounds = "|c| <= 1 and |h| <= tanh 1" if call.lstm else "|h| <= 1"
        raise ValueError(
            f"state lies outside the cell's invariant set {bounds} by {excess:.1e}, where no state of this cell "
            "can be: pass a final state of this cell, or set project to false"
        )
