"""Nonlinear recurrences, in time order or by Newton's method in parallel: ParaGRU, ParaLSTM, and one's own.

A name is imported when it is asked for: a config reads the solver's settings, and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.newton_rnn.decode import gru_step, lstm_step
    from kernels.newton_rnn.generic import check_structure, recurrence
    from kernels.newton_rnn.op import gru, lstm
    from kernels.newton_rnn.solver import NewtonError, Report, Solution, Solver, split_problems
    from kernels.newton_rnn.split import Exchange

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

_MODULES = {
    "decode": ("gru_step", "lstm_step"),
    "generic": ("check_structure", "recurrence"),
    "op": ("gru", "lstm"),
    "solver": ("NewtonError", "Report", "Solution", "Solver", "split_problems"),
    "split": ("Exchange",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
