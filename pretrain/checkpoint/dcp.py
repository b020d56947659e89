"""torch's distributed checkpoint (DCP), as the store calls it.

DCP takes a second to import, with all of DTensor and sympy, and the first step needs none of it: the store imports this
module, and so all that imports DCP, with the first save or load.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain.checkpoint.boxes import Boxes
from pretrain.checkpoint.planner import BoxesLoadPlanner, BoxesSavePlanner
from pretrain.checkpoint.ranks import Ranks, describe, joined
from pretrain.checkpoint.storage import ChecksummingWriter, ChunkReader
from pretrain.errors import may_pass


def write_leaves(folder: Path, leaves: dict[str, Any], ranks: Ranks) -> ChecksummingWriter:
    """Write what the ranks hold of the leaves into a folder; collective. Returns the writer, which goes on with files
    of other kinds. Raises CheckpointError."""
    writer = ChecksummingWriter(folder)
    with _unwrapped(ranks.size):
        save(
            leaves,
            storage_writer=writer,
            planner=BoxesSavePlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return writer


def read_leaves(folder: Path, leaves: dict[str, Boxes], ranks: Ranks) -> None:
    """Fill the blocks of the leaves from a folder; collective. Raises CheckpointError."""
    with _unwrapped(ranks.size):
        load(
            leaves,
            storage_reader=ChunkReader(folder),
            planner=BoxesLoadPlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


@contextmanager
def _unwrapped(world_size: int) -> Iterator[None]:
    """Turn DCP's failure, which is no Exception and holds one per rank, into a CheckpointError.

    One process without torch.distributed is a supported way to run: DCP's warning of it is not shown.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        failures = {rank: (describe(cause), may_pass(cause)) for rank, (cause, _) in error.failures.items()}
        raise joined(failures, world_size) from error
