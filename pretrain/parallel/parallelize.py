"""The one place where a plain model becomes a parallel one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.checkpoint.fragments import Placement
from pretrain.parallel.context import SharedSequences, share_sequences

if TYPE_CHECKING:
    from pretrain.config import ParallelSection
    from pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parallelized:
    model: nn.Module
    placements: dict[str, Placement]
    """Where each parameter's local tensor lies in the plain model's, by the plain model's names."""
    sequences: SharedSequences
    """Which positions of a batch this rank computes."""


def parallelize(model: nn.Module, mesh: Mesh, parallel: ParallelSection) -> Parallelized:
    """Apply, in this order: tensor parallelism, context parallelism, activation checkpointing, compilation.

    Tensor parallelism swaps layers, so it comes first: what follows must wrap the layers that stay.
    Compilation is last, to see the block as it will run. Data parallelism is the engine's.
    """
    placements = shard_tensors(model, mesh)
    sequences = share_sequences(model, mesh, parallel)
    if parallel.activation_checkpointing == "full":
        checkpoint_blocks(model)
    if parallel.compile:
        compile_blocks(model)
    return Parallelized(model, placements, sequences)


def shard_tensors(model: nn.Module, mesh: Mesh) -> dict[str, Placement]:
    """Split weights over the tensor axis. With one rank on it every tensor lies whole in itself."""
    assert mesh.tensor.size == 1, "config.py admits parallel.tensor=1 only"
    return {name: Placement.whole(parameter.shape) for name, parameter in model.named_parameters()}


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass and recompute the rest."""
    for block in model.get_submodule("blocks").children():
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    return call


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block: all blocks share one compiled graph, and start-up stays short."""
    for block in model.get_submodule("blocks").children():
        block.compile()
