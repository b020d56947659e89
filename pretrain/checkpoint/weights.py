"""Reading the fp32 weights of a checkpoint into a plain model, without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain.checkpoint.boxes import Boxes
from pretrain.checkpoint.dcp import read_leaves
from pretrain.checkpoint.planner import check_cover
from pretrain.checkpoint.ranks import Ranks, describe
from pretrain.checkpoint.steps import telling_how_to_restore, verify_step
from pretrain.checkpoint.storage import ChunkReader
from pretrain.errors import CheckpointError

MASTER_PREFIX = "master."
NAMES_SHOWN = 3

Shapes = Mapping[str, tuple[int, ...]]


def load_weights(path: Path, names_to_tensors: dict[str, Tensor], *, checksums: bool = True) -> None:
    """Copy the weights of a step into plain tensors, in this process alone.

    Args:
        path: a step folder.
        names_to_tensors: `dict(model.named_parameters())` of the plain model, on any device and of any float
            dtype; the float32 weights are converted.
        checksums: False trusts the files' sizes. The moments, twice the size of the weights, lie in the same
            files and are read to verify them.

    Raises:
        CheckpointError: a missing or altered file, or parameters other than the model's.
    """
    path = Path(path)
    try:
        with telling_how_to_restore(path):
            verify_step(path, checksums=checksums)
        check_parameters(
            {name: tuple(tensor.shape) for name, tensor in names_to_tensors.items()},
            read_parameter_shapes(path),
        )
        leaves = {
            MASTER_PREFIX + name: Boxes(
                tuple(tensor.shape), torch.float32, {(0,) * tensor.dim(): tensor.detach()}
            )
            for name, tensor in names_to_tensors.items()
        }
        read_leaves(path, leaves, Ranks(group=None))
    except Exception as error:
        raise CheckpointError(f"the weights of {path} cannot be loaded: {describe(error)}") from error


def read_parameter_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a step.

    Raises:
        CheckpointError: a tensor is not stored completely.
    """
    metadata = ChunkReader(path).read_metadata()
    check_cover(metadata)
    return {
        key.removeprefix(MASTER_PREFIX): tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(MASTER_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }


def check_parameters(expected: Shapes, stored: Shapes) -> None:
    """Compare a model's parameters with those stored.

    Raises:
        CheckpointError: with all differences.
    """
    absent = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    reshaped = [
        f"{name} is {stored[name]} in the checkpoint and {shape} in the model"
        for name, shape in expected.items()
        if name in stored and stored[name] != tuple(shape)
    ]
    problems = []
    if absent:
        problems.append(f"the checkpoint lacks {_some(absent)}")
    if reshaped:
        problems.append(_some(reshaped))
    if extra:
        problems.append(f"the model lacks {_some(extra)}")
    if problems:
        raise CheckpointError(
            f"the model is not the one that was saved: {'; '.join(problems)}. "
            "Resuming needs the model section of the config as it was; it is in the step's meta.json"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
