"""The file that makes a step whole: written last, it holds every other file's size and checksum."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
FORMAT_VERSION = 1
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and zlib.crc32 of one file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a whole step consists of.

    Attributes:
        step: optimizer steps done.
        world_size: number of ranks that wrote it.
        written_at: time of the commit, seconds since 1970.
        writer_id: who wrote it, recorded as given.
        files: file name inside the step folder -> its record.
    """

    step: int
    world_size: int
    written_at: float
    writer_id: str
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest excluded."""
        return sum(record.bytes for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a step: after this returns, the step survives a power loss.

    The files named must be on disk already. Order: temporary file, fsync, fsync of the folder (the other
    files' names), rename, fsync of the folder and of its parent.
    """
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)
    temporary.rename(folder / MANIFEST_NAME)
    fsync_folder(folder)
    fsync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """Read a step folder's manifest.

    Raises:
        CheckpointError: it is absent (the save was interrupted), unreadable, or of a newer format.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("format_version")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        manifest = Manifest(files=files, format_version=version, **raw)
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST_NAME} is missing: the save was interrupted") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME} has format version {manifest.format_version}; "
            f"this release reads {FORMAT_VERSION}"
        )
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the files' presence and sizes with the manifest, without reading them.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    for name, record in sorted(manifest.files.items()):
        try:
            actual = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{name} is missing or unreadable: {error.strerror}") from error
        if actual != record.bytes:
            raise CheckpointError(f"{name} has {actual:,} bytes, not {record.bytes:,}")


def check_checksum(folder: Path, name: str, record: FileRecord) -> None:
    """Read one file and compare its checksum.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        actual = checksum_of_file(folder / name)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
    if actual != record.crc32:
        raise CheckpointError(f"{name} has been altered: checksum {actual:08x}, not {record.crc32:08x}")


def checksum_of_file(path: Path) -> int:
    """zlib.crc32 of a file's bytes."""
    checksum = 0
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
    return checksum


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
