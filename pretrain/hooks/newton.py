"""What Newton's method was worth in each recurrent layer, and the alarm when it was not worth enough."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor

from models.pararnn.telemetry import FIGURES, MAXIMA
from pretrain.errors import UserError
from pretrain.hooks.base import Hook, Setup, due
from pretrain.monitoring import Record, layer_scalar

if TYPE_CHECKING:
    from kernels.newton_rnn import Solver
    from models.pararnn.cells import Cell
    from pretrain.engine.base import StepReport
    from pretrain.parallel.mesh import Mesh
    from pretrain.run import Run

logger = logging.getLogger(__name__)

RESIDUAL, ITERATIONS, ACTED = (FIGURES.index(name) for name in ("residual_max", "iterations", "acted"))


class NewtonHook(Hook):
    """Logs each layer's figures at log steps, and acts by `model.newton.on_exceed`.

    Under "error" every step is looked at before its update: a residual above the limit, or one that is not
    finite, stops the run with the weights as they were. That read waits for the device once per step, at the
    place where DeepSpeed (ZeRO 1 to 3) does so for the gradient norm. Under the other policies the device is
    read at log steps only: a warning, with a line in the ledger, says that the policy had to act; a residual
    that is not finite stops the run there.

    The figures since the last log are not part of a checkpoint.
    """

    name = "newton"

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        model = setup.config.model
        if getattr(model, "newton", None) is None:
            return None
        section = f"model.{getattr(model, 'newton_at', '')}"
        return cls(setup.config.monitor.log_every_steps, model.newton, section)

    def __init__(self, every: int, solver: Solver, section: str = "model.") -> None:
        self._every = every
        self._solver = solver
        self._section = section

    def before_training(self, run: Run) -> None:
        self._run = run
        with run.engine.inference() as model:
            self._cells: dict[str, Cell] = model.cells()  # type: ignore[operator]
        self._names = names_of_all(list(self._cells), run.mesh)
        self._checked = -1
        self._skipped_before = run.finite.skipped
        if self._solver.on_exceed == "error":
            run.engine.before_update(self._check_before_update)

    def _check_before_update(self) -> None:
        # Called once per parameter group; the clock still counts the step before.
        if self._checked == self._run.clock.step:
            return
        self._checked = self._run.clock.step
        figures = self._reduced({name: cell.telemetry.peek() for name, cell in self._cells.items()})
        step = self._run.clock.step + 1
        skips = self._run.finite.may_skip  # what is not finite is left to the hook that counts such steps
        refuse(
            self._names,
            figures.tolist(),
            self._solver,
            step,
            "its update was not applied",
            skips=skips,
            section=self._section,
        )

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run.clock.step, self._every) or run.clock.done:
            if run.finite.may_skip:
                run.finite.settle(run)
            figures = self._reduced(
                {name: cell.telemetry.take() for name, cell in self._cells.items()}
            ).tolist()
            consequence = "it is not in a checkpoint"
            # Of a step that was skipped the figures may be anything; at the next log they are of other steps.
            skips = run.finite.skipped > self._skipped_before
            self._skipped_before = run.finite.skipped
            refuse(
                self._names,
                figures,
                self._solver,
                run.clock.step,
                consequence,
                skips=skips,
                section=self._section,
            )
            run.reporter.write(run.clock.step, as_record(figures, [layer_of(name) for name in self._names]))
            self._warn(figures)

    def _reduced(self, layers: dict[str, Tensor]) -> Tensor:
        """(layers, figures) of all stages over all ranks: maxima of the maxima, means of the means. Collective."""
        mesh = self._run.mesh
        figures = torch.zeros(len(self._names), len(FIGURES), device=self._run.device)
        for name, of_layer in layers.items():
            figures[self._names.index(name)] = of_layer
        # A layer is on one stage, so that its mean is over the replicas. Ranks of the tensor axis have equally many
        # channels each.
        for axis, holders in (
            (mesh.contributors, mesh.replicas.size),
            (mesh.tensor, mesh.tensor.size),
        ):
            if axis.size == 1:
                continue
            # A NaN may be lost in a maximum over ranks; infinity is not, and stops all of them alike.
            maxima = figures[:, :MAXIMA].nan_to_num(nan=math.inf, posinf=math.inf)
            sums = figures[:, MAXIMA:].contiguous()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=axis.group)
            dist.all_reduce(sums, group=axis.group)
            figures = torch.cat((maxima, sums / holders), dim=1)
        return figures

    def _warn(self, figures: list[list[float]]) -> None:
        acted = {n: layer for n, layer in zip(self._names, figures, strict=True) if layer[ACTED] > 0}
        if not acted:
            return
        step, policy = self._run.clock.step, self._solver.on_exceed
        worst = max(acted, key=lambda name: acted[name][RESIDUAL])
        still = acted[worst][RESIDUAL] > self._solver.limit
        logger.warning(
            "step %d: Newton's method left %s above %snewton.limit = %g, and on_exceed: %s had to act "
            "(worst: %s, residual %.3g %s; states may be off by some times that)",
            step,
            ", ".join(acted),
            self._section,
            self._solver.limit,
            policy,
            worst,
            acted[worst][RESIDUAL],
            "all the same" if still else "afterwards",
        )
        self._run.record(
            "newton", step=step, layers=list(acted), policy=policy, residual=acted[worst][RESIDUAL]
        )


def names_of_all(here: list[str], mesh: Mesh) -> list[str]:
    """The layers of all stages, first layer first, from those of this rank. Collective."""
    if mesh.pipeline.size == 1:
        return here
    found: list[list[str]] = [[] for _ in range(dist.get_world_size(mesh.control))]
    dist.all_gather_object(found, here, group=mesh.control)
    return sorted({name for names in found for name in names}, key=layer_of)


def refuse(
    cells: list[str],
    figures: list[list[float]],
    solver: Solver,
    step: int,
    consequence: str,
    *,
    skips: bool = False,
    section: str = "model.",
) -> None:
    """Raise UserError naming the first layer whose states are not to be trusted.

    figures: (layers, FIGURES), the same on all ranks, so that all of them stop. skips: residuals that are not finite
        are of a step that is skipped. section: of the config, in which the settings are.
    """
    for name, layer in zip(cells, figures, strict=True):
        residual, iterations = layer[RESIDUAL], int(layer[ITERATIONS])
        exceeds = solver.on_exceed == "error" and residual > solver.limit
        if not math.isfinite(residual) and skips:
            continue
        if math.isfinite(residual) and not exceeds:
            continue
        state = f"above {section}newton.limit = {solver.limit:g}" if math.isfinite(residual) else "not finite"
        raise UserError(
            f"{name}, step {step}: the residual after {iterations} Newton iterations is {residual:.3g}, {state}; "
            f"{consequence}. Raise {section}newton.iterations, set {section}newton.on_exceed to iterate or sequential, "
            f"or lower {section}recurrent_clip or optim.lr"
        )


def layer_of(name: str) -> int:
    """The number of the block that a recurrence is in."""
    return int(name.split(".")[1])


def as_record(figures: list[list[float]], layers: list[int] | None = None) -> Record:
    """(layers, figures) as scalars: each layer's, and the greatest of all. layers: their blocks' numbers; None: all."""
    layers = list(range(len(figures))) if layers is None else layers
    record: Record = {}
    for number, name in enumerate(FIGURES):
        scalar = f"newton/{name}"
        record[scalar] = max(layer[number] for layer in figures)
        record |= {layer_scalar(scalar, at): layer[number] for at, layer in zip(layers, figures, strict=True)}
    return record
