"""The one place where a plain model becomes a parallel one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.checkpoint.fragments import Placement

if TYPE_CHECKING:
    from pretrain.config import ParallelSection
    from pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parallelized:
    model: nn.Module
    placements: dict[str, Placement]
    """Where each parameter's local tensor lies in the plain model's, by the plain model's names."""


def parallelize(model: nn.Module, mesh: Mesh, parallel: ParallelSection) -> Parallelized:
    """Apply, in this order: tensor parallelism, activation checkpointing, compilation.

    Tensor parallelism swaps layers, so it comes first: checkpointing must wrap the layers that stay.
    Compilation is last, to see the block as it will run. Data parallelism is the engine's.
    """
    placements = shard_tensors(model, mesh)
    if parallel.activation_checkpointing == "full":
        checkpoint_blocks(model)
    if parallel.compile:
        compile_blocks(model)
    return Parallelized(model, placements)


def shard_tensors(model: nn.Module, mesh: Mesh) -> dict[str, Placement]:
    """Split weights over the tensor axis. With one rank on it every tensor lies whole in itself."""
    assert mesh.tensor.size == 1, "config.py admits parallel.tensor=1 only"
    return {name: Placement.whole(parameter.shape) for name, parameter in model.named_parameters()}


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass and recompute the rest."""
    for block in model.get_submodule("blocks").children():
        forward = block.forward

        def recomputed(*inputs: object, _forward=forward, **options: object) -> object:  # type: ignore[no-untyped-def]
            if not torch.is_grad_enabled():
                return _forward(*inputs, **options)
            return checkpoint(_forward, *inputs, use_reentrant=False, **options)

        block.forward = recomputed  # type: ignore[method-assign]


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block: all blocks share one compiled graph, and start-up stays short."""
    for block in model.get_submodule("blocks").children():
        block.compile()
