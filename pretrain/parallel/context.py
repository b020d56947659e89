"""Context parallelism: ranks that share rows, each with some of the positions.

A model's mixers are the only modules in which a position meets others. `share_sequences` gives each of them a way to
do so across ranks (`MIXERS`); everything else runs on a rank's positions as it runs on a whole row's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from data_pipelines.stream.sequence_part import SequencePart, part_of_batch
from models.layers.conv import CausalConv
from models.mamba2.mixer import Mamba2Mixer
from models.pararnn.cells import Cell
from models.sigmoid.mixer import SigmoidAttention
from models.softmax.mixer import SoftmaxAttention
from pretrain.parallel.context_attention import gathered_attend, swapped_attend
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
        """What this rank is to compute of a batch that all ranks of the axis have whole."""
        if not self.shared:
            return batch
        part = part_of_batch(batch, self.part)
        # The host made new tensors of it: a copy to the GPU shall not wait now where it did not before.
        return part.pin_memory() if batch.sequences.is_pinned() else part

    @contextlib.contextmanager
    def whole_rows(self) -> Iterator[None]:
        """The model takes whole rows meanwhile, each rank for itself: for generation, and whatever has other rows
        than training."""
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

        # What lies between the collectives is compiled; they themselves are Python objects to the compiler.
        setattr(module, method, torch.compiler.disable(call))


def share_sequences(model: Any, mesh: Mesh, parallel: ParallelSection) -> SharedSequences:
    """Let the model's mixers work on rows that the context axis shares."""
    sequences = SharedSequences(model, mesh)
    if sequences.shared:
        for block in model.blocks.children():
            known = any(isinstance(module, tuple(MIXERS)) for module in block.modules())
            assert known, (
                f"{type(block).__name__} has no mixer in MIXERS: its positions would meet on one rank alone"
            )
        for module in list(model.modules()):
            for kind, share in MIXERS.items():
                if isinstance(module, kind):
                    share(module, sequences, parallel)
    return sequences


def _share_sigmoid(attention: SigmoidAttention, sequences: SharedSequences, _: ParallelSection) -> None:
    sequences.instead(attention, "attend", gathered_attend(attention, sequences.part, sequences.exchange))


def _share_softmax(attention: SoftmaxAttention, sequences: SharedSequences, _: ParallelSection) -> None:
    sequences.instead(attention, "attend", swapped_attend(attention, sequences.exchange))


def _share_cell(cell: Cell, sequences: SharedSequences, parallel: ParallelSection) -> None:
    across = summarised_solve if parallel.recurrence == "summaries" else swapped_solve
    sequences.instead(cell, "solve", across(cell, sequences.exchange))


def _share_convolution(conv: CausalConv, sequences: SharedSequences, _: ParallelSection) -> None:
    sequences.instead(conv, "forward", haloed_convolution(conv, sequences.exchange))


def _share_mamba2(mixer: Mamba2Mixer, sequences: SharedSequences, _: ParallelSection) -> None:
    sequences.instead(mixer, "scan", swapped_scan(mixer, sequences.exchange))


MIXERS: dict[type[nn.Module], Callable[..., None]] = {
    SigmoidAttention: _share_sigmoid,
    SoftmaxAttention: _share_softmax,
    Cell: _share_cell,
    CausalConv: _share_convolution,
    Mamba2Mixer: _share_mamba2,
}
"""How each kind of module in which positions meet is shared. A new mixer has a row here."""
