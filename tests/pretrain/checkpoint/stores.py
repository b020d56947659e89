"""Stores of one process for the tests, and what to do to their folders."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint import CheckpointStore
from tests.pretrain.checkpoint.states import make_state


def open_alone(folder: Path, *, keep_last: int = 9, keep_every_steps: int | None = None) -> CheckpointStore:
    """A store of one process without torch.distributed."""
    return CheckpointStore(folder, group=None, keep_last=keep_last, keep_every_steps=keep_every_steps)


def save_all(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, make_state(step))
    store.wait()


def flip_bit(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
