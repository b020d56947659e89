"""Tensor and sequence parallelism: what a model's modules declare of their layers (`splits`), applied.

Heads, channels and vocabulary are divided over the ranks of the tensor axis. With sequence parallelism (Korthikanti et
al., arXiv:2205.05198) so are the positions in all that lies between: the residual stream, norms and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.declared import mixers, splits_of, undivided_mixers
from models.sharding import Channels, Divisible, Part, Row, Shared, Split, Vocab
from pretrain.checkpoint.fragments import Placement, Segment
from pretrain.errors import ConfigError
from pretrain.parallel.without_cuda import stand_in_for_cuda

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Axis


@dataclass
class Sharded:
    """What became of a model's parameters, by name.

    placements: where each local tensor lies in the plain model's.
    partial: whole parameters of whose gradient a rank has a part: the sum over the tensor axis is the gradient.
    """

    placements: dict[str, Placement] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)


def shard_tensors(model: Any, axis: Axis, *, sequence: bool) -> Sharded:
    """Divide a `LanguageModel`, in place, over the ranks of the tensor axis. With one rank on it nothing changes.

    Afterwards every rank has its part of the shapes, and no values: the model may be on the meta device, and is filled
    by `pretrain.parallel.weights`. Parameters keep their names, and a layer that tells sizes tells this rank's.

    sequence: whether the ranks share the positions between the layers too.

    Raises ConfigError for a mixer that does not declare its `splits`.
    """
    sharded = Sharded({name: Placement.whole(tuple(p.shape)) for name, p in model.named_parameters()})
    if axis.size == 1:
        return sharded
    undeclared = undivided_mixers(model)
    if undeclared:
        raise ConfigError(
            f"parallel.tensor = {axis.size}: {', '.join(undeclared)} does not declare `splits`, how its "
            "layers' weights are divided; use parallel.tensor=1"
        )
    stand_in_for_cuda()
    tied = model.head is not None and model.embedding is not None
    tied = tied and model.head.weight is model.embedding.weight
    splits = splits_of(model)
    for name, split in splits.items():
        sharded.placements |= _divide(model, name, split, axis, sequence)
    if tied:
        model.head.weight = model.embedding.weight
        del sharded.placements["head.weight"]
    regions = {name.rpartition(".")[0] for name, split in splits.items() if isinstance(split, Row)}
    if sequence:
        _check_gathered(model, regions)
    part = Part(axis.rank, axis.size, _Sum(axis.group))
    for module in model.modules():
        if isinstance(module, Divisible):
            module.take_part(part)
    _open_regions(model, regions, axis, sequence)
    sharded.partial = _partial_gradients(sharded.placements, splits, regions, sequence)
    return sharded


def _check_gathered(model: Any, regions: set[str]) -> None:
    """That whole rows enter every mixer: it owns a `Row`, or lies in what does. Raises ConfigError by its class."""
    names = {module: name for name, module in model.named_modules()}
    for mixer in mixers(model):
        if not any(f"{names[mixer]}.".startswith(f"{region}.") for region in regions):
            raise ConfigError(
                f"parallel.sequence = true: {type(mixer).__name__} declares no Row(), so that it would see a part of "
                "each row; use parallel.sequence=false"
            )


def mark_parameters(model: nn.Module, sharded: Sharded, axis: Axis) -> None:
    """Tell the engines which parameters are parts, and make partial gradients whole.

    Both engines take a parameter without Megatron's marks for a copy, and would then count a part's gradient once where
    its norm needs the sum over the ranks. Call it when the parameters are final: marks and hooks belong to the object.
    """
    if axis.size == 1:
        return
    add_up = _Sum(axis.group)
    for name, parameter in model.named_parameters():
        dim = sharded.placements[name].dim
        marks = {"tensor_model_parallel": dim is not None, "partition_dim": -1 if dim is None else dim}
        for key, value in (*marks.items(), ("partition_stride", 1)):
            setattr(parameter, key, value)
        if name in sharded.partial:
            parameter.register_hook(add_up.copied)


class _Sum:
    """Adds a tensor up over a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, tensor: Tensor) -> Tensor:
        """In place."""
        assert tensor.is_contiguous()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def copied(self, tensor: Tensor) -> Tensor:
        return self(tensor.clone(memory_format=torch.contiguous_format))


def _divide(model: Any, name: str, split: Split, axis: Axis, sequence: bool) -> dict[str, Placement]:
    """Swap one module, or its parameters, for this rank's part. Returns the placements of its parameters."""
    from pretrain.parallel import tensor_layers

    layer = model.get_submodule(name)
    if isinstance(split, Shared):
        return {}
    if isinstance(split, Channels):
        return _divide_channels(layer, name, split, axis)
    shape = tuple(layer.weight.shape)
    new: nn.Module
    with layer.weight.device:
        if isinstance(split, Vocab):
            vocabulary = isinstance(layer, nn.Embedding)
            new = (
                tensor_layers.SharedEmbedding(layer, axis, sequence)
                if vocabulary
                else tensor_layers.SharedHead(layer, axis)
            )
            placement = vocabulary_placement(shape, axis)
        elif isinstance(split, Row):
            new = tensor_layers.RowLinear(layer, axis, sequence)
            placement = even_placement(shape, 1, (shape[1],), axis)
        else:
            new = tensor_layers.ColumnLinear(layer, axis)
            placement = even_placement(shape, 0, split.stacked or (shape[0],), axis)
    model.set_submodule(name, new)
    return {f"{name}.weight": placement}


def _divide_channels(layer: nn.Module, name: str, split: Channels, axis: Axis) -> dict[str, Placement]:
    placements = {}
    for key, parameter in list(layer.named_parameters(recurse=False)):
        dim, shape = split.dimensions[key], tuple(parameter.shape)
        local = [size // axis.size if index == dim else size for index, size in enumerate(shape)]
        setattr(layer, key, nn.Parameter(parameter.new_empty(local)))
        placements[f"{name}.{key}"] = even_placement(shape, dim, (shape[dim],), axis)
    return placements


def even_placement(shape: tuple[int, ...], dim: int, stacked: tuple[int, ...], axis: Axis) -> Placement:
    """This rank's part of each of the stacked lengths along a dimension, one after the other."""
    segments, here, there = [], 0, 0
    for length in stacked:
        assert length % axis.size == 0, f"{shape}: {length} does not divide by {axis.size}: check_tensor"
        part = length // axis.size
        segments.append(Segment(here, there + axis.rank * part, part))
        here, there = here + part, there + length
    return Placement(shape, dim, tuple(segments))


def vocabulary_placement(shape: tuple[int, ...], axis: Axis) -> Placement:
    """Ranks hold equally many rows, of which the last ranks' may stand for no token."""
    rows = -(-shape[0] // axis.size)
    real = max(0, min(rows, shape[0] - axis.rank * rows))
    return Placement(shape, 0, (Segment(0, axis.rank * rows, real),) if real else ())


def _open_regions(model: Any, regions: set[str], axis: Axis, sequence: bool) -> None:
    from pretrain.parallel.tensor_layers import Region

    region = Region(axis, sequence)
    for name in regions:
        model.get_submodule(name).register_forward_pre_hook(region.before)
    if model.norm is not None:
        model.norm.register_forward_hook(region.after)  # the head's region


def _partial_gradients(
    placements: Mapping[str, Placement], splits: Mapping[str, Split], regions: set[str], sequence: bool
) -> set[str]:
    """The whole parameters that work on a part: of the channels, within regions, or of the positions."""
    partial = set()
    for name in (name for name, placement in placements.items() if placement.dim is None):
        owner = name.rpartition(".")[0]
        inside = any(name.startswith(f"{region}.") for region in regions)
        assert not inside or isinstance(splits.get(owner), Shared), f"nothing is declared of {owner}"
        if inside or sequence:
            partial.add(name)
    return partial
