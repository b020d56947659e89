"""Context parallelism: ranks that share rows, each with some of the positions.

A model's mixers are the only modules in which a position meets others, and each declares how (`models.declared`).
`share_sequences` makes those methods work across ranks (`WAYS`); all else treats a rank's positions like a whole row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from data_pipelines.stream.sequence_part import SequencePart, part_of_batch
from models.declared import Crossing, DeclarationError, crossings_of
from models.layers.conv import CausalConv
from models.mamba2.mixer import Mamba2Mixer
from models.pararnn.cells import Cell
from models.sigmoid.mixer import SigmoidAttention
from pretrain.errors import ConfigError
from pretrain.parallel.context_attention import gathered_attend, swapped
from pretrain.parallel.context_recurrence import (
    haloed_convolution,
    summarised_solve,
    swapped_scan,
    swapped_solve,
)
from pretrain.parallel.exchange import Exchange

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from pretrain.config import ParallelSection
    from pretrain.parallel.mesh import Mesh


class SharedSequences:
    """A model's rows, shared by the ranks of the context axis; with one rank on it, nothing is shared."""

    def __init__(self, model: Any, mesh: Mesh) -> None:
        self._model = model
        self.exchange = Exchange(mesh.context)
        self.part = SequencePart(mesh.context.rank, mesh.context.size, model.config.row_order)
        self.shared = False
        self._share(mesh.context.size > 1)

    def part_of(self, batch: Batch) -> Batch:
        """The positions that this rank computes, of a batch that every rank of the axis has read whole."""
        if not self.shared:
            return batch
        part = part_of_batch(batch, self.part)
        # Cutting made new tensors, which are not pinned: without this, copying them to the GPU would wait.
        return part.pin_memory() if batch.sequences.is_pinned() else part

    @contextlib.contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Within this, each rank computes whole rows by itself: for generation, and other work whose rows are not those
        of training."""
        shared = self.shared
        self._share(False)
        try:
            yield
        finally:
            self._share(shared)

    def _share(self, shared: bool) -> None:
        self.shared = shared
        self._model.sequence_parts = self.part.count if shared else 1

    def instead(self, module: nn.Module, method: str, across: Callable[..., Any]) -> None:
        """Have `across` called in place of a module's method where rows are shared."""
        plain = getattr(module, method)

        def call(*inputs: Any, **named: Any) -> Any:
            return across(*inputs, **named) if self.shared else plain(*inputs, **named)

        # The compiler cannot trace the collectives. It still compiles what lies between them.
        setattr(module, method, torch.compiler.disable(call))


def share_sequences(model: Any, mesh: Mesh, parallel: ParallelSection) -> SharedSequences:
    """Let the model's mixers work on rows that the context axis shares. Raises ConfigError for a mixer that does not
    declare how, or declares a way that is not in `WAYS`."""
    sequences = SharedSequences(model, mesh)
    if sequences.shared:
        try:
            for module, crossing in list(crossings_of(model)):
                way = chosen_way(crossing, parallel.recurrence)
                check_served(module, crossing, way)
                across = WAYS[way].across(module, crossing, sequences)
                sequences.instead(module, crossing.method, across)
        except DeclarationError as error:
            raise ConfigError(
                f"parallel.context = {mesh.context.size}: {error}; use parallel.context=1"
            ) from None
    return sequences


def check_served(module: nn.Module, crossing: Crossing, way: str) -> None:
    """Each way but `swap` replaces the method of one class, and serves no other. Raises DeclarationError."""
    if way not in WAYS:
        raise DeclarationError(f"{type(module).__name__} declares {way!r}; there are {', '.join(WAYS)}")
    served, method = WAYS[way].serves, crossing.method
    if served is None:
        return
    theirs = getattr(served, method, None)
    replaced = getattr(type(module), method) is not theirs and not getattr(
        theirs, "__isabstractmethod__", False
    )
    if not isinstance(module, served) or replaced:
        raise DeclarationError(
            f"{type(module).__name__} declares {way!r}, which is for {served.__name__}.{method} alone; declare 'swap'"
        )


def chosen_way(crossing: Crossing, recurrence: str) -> str:
    """The one of its ways that the config's `parallel.recurrence` asks for; else its first."""
    if not crossing.ways:
        raise DeclarationError(f"a crossing of {crossing.method} declares no ways")
    return "summaries" if recurrence == "summaries" and "summaries" in crossing.ways else crossing.ways[0]


@dataclass(frozen=True)
class WayAcross:
    """How a mixer works across ranks in one of the ways that it may declare (`models.declared.Way`).

    across: makes what takes the place of the module's method.
    serves: the class whose method that is; None: any module's.
    """

    across: Callable[[Any, Crossing, SharedSequences], Callable[..., Any]]
    serves: type[nn.Module] | None


WAYS = {
    "gather": WayAcross(
        lambda module, _, shared: gathered_attend(module, shared.part, shared.exchange), SigmoidAttention
    ),
    "swap": WayAcross(lambda module, crossing, shared: swapped(module, crossing, shared.exchange), None),
    "swap_channels": WayAcross(lambda module, _, shared: swapped_solve(module, shared.exchange), Cell),
    "swap_state": WayAcross(lambda module, _, shared: swapped_scan(module, shared.exchange), Mamba2Mixer),
    "summaries": WayAcross(lambda module, _, shared: summarised_solve(module, shared.exchange), Cell),
    "halo": WayAcross(lambda module, _, shared: haloed_convolution(module, shared.exchange), CausalConv),
}
