"""The one place where a plain model becomes a parallel one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.layers.language_model import LanguageModel
from pretrain.checkpoint.fragments import Placement
from pretrain.errors import ConfigError
from pretrain.parallel.context import SharedSequences, share_sequences
from pretrain.parallel.tensor import mark_parameters, shard_tensors
from pretrain.parallel.weights import fill

if TYPE_CHECKING:
    from pretrain.config import ParallelSection
    from pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parallelized:
    model: LanguageModel
    placements: dict[str, Placement]
    """Where each parameter's local tensor lies in the plain model's, by the plain model's names."""
    sequences: SharedSequences
    """Which positions of a batch this rank computes."""


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    parallel: ParallelSection,
    *,
    device: torch.device,
    seed: int,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Parallelized:
    """Apply, in this order: tensor parallelism, first weights, context parallelism, activation checkpointing,
    compilation.

    The model is on the meta device, so that no rank ever holds weights that it shares. Tensor parallelism swaps
    layers, so it comes first: what follows must wrap the layers that stay. Compilation is last, to see the block as
    it will run. Data parallelism is the engine's.

    aliases: names in the plain model of those parameters of a part of it that are called otherwise there.
    """
    sharded = shard_tensors(model, mesh.tensor, sequence=parallel.sequence)
    fill(model, sharded.placements, device, seed, aliases)
    mark_parameters(model, sharded, mesh.tensor)
    sequences = share_sequences(model, mesh, parallel)
    if parallel.activation_checkpointing == "full":
        checkpoint_blocks(model)
    if parallel.activation_checkpointing == "selective":
        recompute_cheap(model)
    if parallel.compile:
        compile_blocks(model)
    return Parallelized(model, sharded.placements, sequences)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass and recompute the rest."""
    for block in model.get_submodule("blocks").children():
        block.forward = _recomputed(block.forward)


def recompute_cheap(model: nn.Module) -> None:
    """Have each layer recompute its large and cheap part; what that is, the layers with `recompute` say.

    Raises ConfigError for a model without such layers.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "recompute")]
    if not layers:
        raise ConfigError(
            "parallel.activation_checkpointing = selective: no layer of this model has a cheap part; use full or none"
        )
    for layer in layers:
        layer.recompute = True


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
