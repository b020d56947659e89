"""Nonlinear recurrences, in time order or by Newton's method in parallel: ParaGRU, ParaLSTM, and one's own."""

from kernels.newton_rnn.decode import gru_step, lstm_step
from kernels.newton_rnn.generic import check_structure, recurrence
from kernels.newton_rnn.op import gru, lstm
from kernels.newton_rnn.solver import NewtonError, Report, Solution, Solver
from kernels.newton_rnn.split import Exchange, split_problems

__all__ = [
    "Exchange",
    "NewtonError",
    "Report",
    "Solution",
    "Solver",
    "check_structure",
    "gru",
    "gru_step",
    "lstm",
    "lstm_step",
    "recurrence",
    "split_problems",
]
