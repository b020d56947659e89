"""DCP's planners, taught to find the blocks of our leaves."""

from __future__ import annotations

import io
import math
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from pretrain.checkpoint.boxes import Boxes
from pretrain.errors import CheckpointError


class BoxesSavePlanner(DefaultSavePlanner):
    """Saves `Boxes` and plain values."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The data behind a write item. DCP itself resolves shards of torch.Tensor subclasses only."""
        leaf = self.state_dict[index.fqn]
        return leaf.block(index) if isinstance(leaf, Boxes) else super().lookup_object(index)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the blocks of all ranks fill each tensor; DCP leaves that out for one rank."""
        plans, metadata = super().create_global_plan(all_plans)
        check_cover(metadata)
        return plans, metadata


class BoxesLoadPlanner(DefaultLoadPlanner):
    """Loads into `Boxes`, in place; every leaf must be one."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict as it is. The inherited form would replace leaves it does not know by None."""
        assert all(isinstance(leaf, Boxes) for leaf in state_dict.values()), "only Boxes are loaded"
        self.original_state_dict = state_dict
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """The inherited form unpickles whatever stands there."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is stored as an object, not as a tensor")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The view that a read item fills."""
        return self.state_dict[index.fqn].block(index)


def check_cover(metadata: Metadata) -> None:
    """Check that the stored chunks of every tensor have together as many elements as the tensor.

    Raises:
        CheckpointError: naming the first tensor that is not filled.
    """
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if stored != math.prod(entry.size):
                raise CheckpointError(
                    f"{name}: the ranks hold {stored:,} of {math.prod(entry.size):,} elements"
                )
