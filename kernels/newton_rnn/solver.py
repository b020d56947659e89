"""How a recurrence is to be solved, and what came of it. Imports no torch: settings are read with it.

Shape suffixes: B batch, T time, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["auto", "newton", "sequential"]
Policy = Literal["iterate", "sequential", "error"]
METHODS: tuple[Method, ...] = ("auto", "newton", "sequential")
POLICIES: tuple[Policy, ...] = ("iterate", "sequential", "error")


class NewtonError(RuntimeError):
    """Newton's method did not solve a recurrence; the message names the layer."""


@dataclass(frozen=True)
class Solver:
    """The settings of a nonlinear recurrence h_t = f(h_{t-1}, x_t).

    method: "sequential" walks in time; "newton" solves all times at once; "auto" takes the faster by device
        and shape.
    iterations: Newton iterations. Three suffice while recurrent weights stay within 0.5.
    tolerance: stop sooner, once the greatest residual |f(h_{t-1}, x_t) - h_t| is at most this; None never.
    limit: the greatest residual that is accepted. It bounds how far the equations are from holding, not the error of
        the states, which was up to five times as much in tests, and 0.07 in a model with weights of 1.9. The
        default, 1e-2, is about twice what storing a state near 1 in bfloat16 costs (2^-8); three iterations under a
        clip of 0.5 leave some 1e-4, and a diverging iteration leaves 1 and more.
    on_exceed: what to do above the limit: "iterate" further, up to `max_iterations`; solve again by the
        "sequential" form; or "error": `Report.check` raises.
    project: bring each iterate back into the set that the cell's states can never leave (|h| <= 1).
        Without it Newton diverges once recurrent weights pass 1.
    window: solve at most so many positions at a time, carrying the exact state. None: all of them in plain
        torch, the tile's own length in the GPU kernels, which take the longest tile within the window.
    """

    method: Method = "auto"
    iterations: int = 3
    tolerance: float | None = None
    limit: float = 1e-2
    on_exceed: Policy = "iterate"
    max_iterations: int = 12
    project: bool = True
    window: int | None = None

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong with it), for every setting that cannot be."""
        found = []
        if self.method not in METHODS:
            found.append(("method", f"must be one of {', '.join(METHODS)}, got {self.method!r}"))
        if self.on_exceed not in POLICIES:
            found.append(("on_exceed", f"must be one of {', '.join(POLICIES)}, got {self.on_exceed!r}"))
        if self.iterations < 1:
            found.append(("iterations", f"must be at least 1, got {self.iterations}"))
        if self.max_iterations < self.iterations:
            found.append(
                (
                    "max_iterations",
                    f"must be at least iterations ({self.iterations}), got {self.max_iterations}",
                )
            )
        if not self.limit > 0:
            found.append(("limit", f"must be above 0, got {self.limit}"))
        if self.tolerance is not None and not 0 <= self.tolerance <= self.limit:
            found.append(("tolerance", f"must be from 0 to limit ({self.limit}), got {self.tolerance}"))
        if self.window is not None and self.window < 1:
            found.append(("window", f"must be at least 1 position, or none, got {self.window}"))
        return found

    def packed(self) -> list[float]:
        """As numbers, for a custom op's signature."""
        return [
            METHODS.index(self.method),
            self.iterations,
            -1.0 if self.tolerance is None else self.tolerance,
            self.limit,
            POLICIES.index(self.on_exceed),
            self.max_iterations,
            self.project,
            self.window or 0,
        ]

    @classmethod
    def unpacked(cls, numbers: list[float]) -> Solver:
        method, iterations, tolerance, limit, on_exceed, max_iterations, project, window = numbers
        return cls(
            method=METHODS[int(method)],
            iterations=int(iterations),
            tolerance=None if tolerance < 0 else tolerance,
            limit=limit,
            on_exceed=POLICIES[int(on_exceed)],
            max_iterations=int(max_iterations),
            project=bool(project),
            window=int(window) or None,
        )


def split_problems(solver: Solver) -> list[tuple[str, str]]:
    """(field, what is wrong with it) of every setting with which parts cannot be solved."""
    found = []
    if solver.method == "sequential":
        found.append(("method", "must be auto or newton where sequences are split, got 'sequential'"))
    if solver.on_exceed == "sequential":
        found.append(("on_exceed", "must be iterate or error where sequences are split, got 'sequential'"))
    if solver.window is not None:
        found.append(("window", f"must be null where sequences are split, got {solver.window}"))
    return found


@dataclass(frozen=True)
class Report:
    """What a solution was worth, as scalars that stay on the device until somebody reads them.

    residual_max, residual_mean: of |f(h_{t-1}, x_t) - h_t| over all positions and channels, at the states
        that were returned; where these were computed in time order 0, or not a number if a state is not
        finite. Infinite if the iteration overflowed, or if on a GPU the initial state lies outside the
        set that iterates are projected onto.
    iterations: Newton iterations taken, the most over all windows; 0 for the sequential form.
    jacobian_norm: the greatest norm of d h_t / d h_{t-1} (row sums of absolute values).
    acted: 1 if the residual was above the limit after `Solver.iterations` and the policy took over.
    """

    residual_max: Tensor
    residual_mean: Tensor
    iterations: Tensor
    jacobian_norm: Tensor
    acted: Tensor
    solver: Solver

    @classmethod
    def of(cls, numbers: Tensor, solver: Solver) -> Report:
        """From the five numbers (5,) that the ops return, in the order of the fields."""
        residual_max, residual_mean, iterations, jacobian_norm, acted = numbers.detach().unbind(0)
        return cls(residual_max, residual_mean, iterations, jacobian_norm, acted, solver)

    def check(self, name: str) -> None:
        """Raise NewtonError, naming the layer `name`, if the residual is not finite, or if it is above the
        limit and the policy is "error". Reads the device: on a GPU call it where one waits anyway.
        """
        residual = float(self.residual_max)
        iterations = int(self.iterations)
        if not math.isfinite(residual):
            raise NewtonError(
                f"{name}: the residual is not finite after {iterations} Newton iterations. Either the inputs "
                "are not finite, or the initial state lies outside the cell's invariant set, or the iteration "
                "diverged: set project to true, or on_exceed to 'sequential', or lower recurrent_clip"
            )
        if self.solver.on_exceed == "error" and residual > self.solver.limit:
            raise NewtonError(
                f"{name}: the residual is {residual:.1e} after {iterations} Newton iterations, above the limit "
                f"of {self.solver.limit:.1e}: its states are not those of the recurrence. Raise iterations, "
                "set on_exceed to 'iterate' or 'sequential', or lower recurrent_clip"
            )


@dataclass(frozen=True)
class Solution:
    """output (B, T, D) in the inputs' dtype; final_state, the exact state after the last position, in fp32:
    (B, D), or (B, 2, D) for cells of two numbers per channel; and the report.
    """

    output_BTD: Tensor
    final_state: Tensor
    report: Report
