"""DCP's own file format, written with checksums taken on the way and read one stored chunk at a time."""

from __future__ import annotations

import ctypes
import io
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from pretrain.checkpoint.manifest import METADATA_NAME, FileRecord, read_manifest
from pretrain.checkpoint.metadata import read_metadata
from pretrain.errors import CheckpointError

BUFFER_BYTES = 1 << 20
WRITEBACK_BYTES = 32 << 20  # how much is handed to the disk at a time while the rest is still being prepared
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start writing dirty pages, wait for nothing

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only


class ChecksummedFile(io.BufferedWriter):
    """A file opened for writing that keeps the crc32 of what was written, and is durable once it is closed.

    The disk is set to work early, so that the final fsync has little left to do.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(cast(io.RawIOBase, path.open("wb", buffering=0)), BUFFER_BYTES)
        self.path = path
        self.checksum = 0
        self.written_bytes = 0
        self._handed_over_bytes = 0

    def write(self, data: Any) -> int:
        """Append bytes-like data."""
        self.checksum = zlib.crc32(data, self.checksum)
        count = super().write(data)
        self.written_bytes += count
        if self.written_bytes - self._handed_over_bytes >= WRITEBACK_BYTES:
            self._start_writeback()
        return count

    def _start_writeback(self) -> None:
        """A hint that may be refused; a failed write is reported by fsync."""
        if _sync_file_range is not None:
            start, length = self._handed_over_bytes, self.written_bytes - self._handed_over_bytes
            _sync_file_range(
                self.fileno(), ctypes.c_int64(start), ctypes.c_int64(length), SYNC_FILE_RANGE_WRITE
            )
        self._handed_over_bytes = self.written_bytes

    def close(self) -> None:
        """Make the bytes durable and close the file."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()


class ChecksummingFileSystem(FileSystem):
    """DCP's local file system; `records` gathers size and checksum of every file written through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        """Open a file; one opened for writing is durable once it is closed."""
        if mode != "wb":
            with Path(path).open(mode) as plain:
                yield cast(IO[bytes], plain)
            return
        with ChecksummedFile(Path(path)) as file:
            yield cast(IO[bytes], file)
        self.records[file.path.name] = FileRecord(file.written_bytes, file.checksum)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file and its record."""
        super().rename(path, new_path)
        if (record := self.records.pop(Path(path).name, None)) is not None:
            self.records[Path(new_path).name] = record


class ChecksummingWriter(FileSystemWriter):
    """DCP's writer of one file per rank; `records` holds what it wrote.

    Args:
        folder: the step's folder, existing and empty.
    """

    def __init__(self, folder: Path) -> None:
        # sync_files=False: ChecksummingFileSystem syncs, and knows of the syncs that went before.
        # per_thread_copy_ahead=0: what is written lies in host memory; copying ahead would start CUDA on the
        # first GPU in the writer thread of every rank.
        super().__init__(
            folder, single_file_per_rank=True, sync_files=False, thread_count=1, per_thread_copy_ahead=0
        )
        self.fs: ChecksummingFileSystem = ChecksummingFileSystem()

    @property
    def records(self) -> dict[str, FileRecord]:
        """File name -> record of every file this rank wrote."""
        return self.fs.records

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's file."""
        with _without_archive_checksums():
            return super().write_data(plan, planner)

    def write_file(self, name: str, data: bytes) -> None:
        """Write one more file beside DCP's."""
        with self.fs.create_stream(Path(self.path) / name, "wb") as file:
            file.write(data)


@contextmanager
def _without_archive_checksums() -> Iterator[None]:
    """Let torch.save leave out its own crc32, which torch.load never checks; the manifest has one."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class ChunkReader(FileSystemReader):
    """DCP's reader, except that it runs nothing that it reads, and reads a stored chunk once, however many blocks want
    a part of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The step's metadata, of the files that its manifest has.

        Raises:
            CheckpointError: it is damaged, or not of this project.
        """
        folder = Path(self.path)
        found = read_metadata(folder / METADATA_NAME, read_manifest(folder).files)
        assert found.storage_meta is not None
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fill the planner's tensors. What is no tensor is a pickle, and is not read."""
        requests: dict[str, dict[MetadataIndex, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise CheckpointError(f"{item.dest_index.fqn} is stored as an object, not as a tensor")
            requests[self.storage_data[item.storage_index].relative_path][item.storage_index].append(item)
        for name, chunks in requests.items():
            with (Path(self.path) / name).open("rb") as file:
                for index in sorted(chunks, key=lambda chunk: self.storage_data[chunk].offset):
                    self._read_chunk(file, index, chunks[index], planner)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    def _read_chunk(
        self, file: IO[bytes], index: MetadataIndex, items: list[ReadItem], planner: LoadPlanner
    ) -> None:
        stored = torch.load(
            self._slice_file(file, self.storage_data[index]), map_location="cpu", weights_only=True
        )
        if not isinstance(stored, torch.Tensor):
            raise CheckpointError(f"{index.fqn} is stored as a {type(stored).__name__}, not as a tensor")
        for item in items:
            part = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).detach().copy_(part)
