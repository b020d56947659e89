"""The file that makes a step whole: written last, it holds every other file's size and checksum."""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
META_NAME = "meta.json"
METADATA_NAME = ".metadata"
NEEDED = (META_NAME, METADATA_NAME)
"""Files without which nothing of a step can be read."""
FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
FORMAT_VERSION = 1
READ_BYTES = 4 << 20
SHOWN = 8  # damaged files that one report names
END_OF_TIME = 1e11  # seconds since 1970; dates beyond it are no dates, and Python's end at 2.5e11
FIELD_TYPES: dict[str, type] = {"step": int, "world_size": int, "written_at": float, "writer_id": str}
RECORD_TYPES: dict[str, type] = {"bytes": int, "crc32": int}


class ManifestMissingError(CheckpointError):
    """A step folder has no manifest, though a folder gets a step's name only once it has one: it was lost."""


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
        json.dump(asdict(manifest), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)
    temporary.rename(folder / MANIFEST_NAME)
    fsync_folder(folder)
    fsync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """Read a step folder's manifest.

    Raises:
        ManifestMissingError: it is absent.
        CheckpointError: it is unreadable, holds values of a wrong type, is of a newer format, names files outside of
            the folder, or lacks files that every step has.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("format_version")
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        manifest = Manifest(files=files, format_version=version, **raw)
        _check_values(manifest)
    except FileNotFoundError:
        raise ManifestMissingError(
            f"{MANIFEST_NAME} is gone: this step was whole once; put the file back from a copy"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: its JSON is nested too deep") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST_NAME} has format version {manifest.format_version}; "
            f"this release reads {FORMAT_VERSION}"
        )
    _check_names(manifest)
    return manifest


def _check_names(manifest: Manifest) -> None:
    """A manifest answers for all that is read of a step, and for nothing else on this machine.

    Raises:
        CheckpointError: a name leads out of the folder, or a file is missing that every step has.
    """
    outside = [name for name in manifest.files if not _is_plain(name)]
    if outside:
        raise CheckpointError(f"{MANIFEST_NAME} names {outside[0]!r}, which is no file of the step's folder")
    missing = [name for name in NEEDED if name not in manifest.files]
    if missing:
        raise CheckpointError(
            f"{MANIFEST_NAME} lists {len(manifest.files)} files, without {' and '.join(missing)}"
        )


def _is_plain(name: str) -> bool:
    return FILE_NAME.fullmatch(name) is not None and name not in (".", "..", MANIFEST_NAME)


def _check_values(manifest: Manifest) -> None:
    """Check the types of what JSON gave.

    Raises:
        TypeError: naming the field, its value, and the type it should have.
        ValueError: the time of the commit is none.
    """
    _check_types("", manifest, FIELD_TYPES)
    for name, record in manifest.files.items():
        _check_types(f"{name}: ", record, RECORD_TYPES)
    if not 0 <= manifest.written_at < END_OF_TIME:
        raise ValueError(f"written_at is {manifest.written_at!r}, not a time in seconds since 1970")


def _check_types(where: str, holder: Manifest | FileRecord, types: dict[str, type]) -> None:
    for field, kind in types.items():
        value = getattr(holder, field)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise TypeError(f"{where}{field} is {value!r}, not of type {kind.__name__}")


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the files' presence and sizes with the manifest, without reading them.

    Raises:
        CheckpointError: naming all files that differ.
    """
    found = (_size_problem(folder / name, record) for name, record in sorted(manifest.files.items()))
    _raise_all([problem for problem in found if problem is not None])


def _size_problem(file: Path, record: FileRecord) -> str | None:
    try:
        found = file.lstat()
    except OSError as error:
        return f"{file.name} is missing or unreadable: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return f"{file.name} is a symbolic link, which may lead out of the folder; put the file itself there"
    if not stat.S_ISREG(found.st_mode):
        return f"{file.name} is no plain file"
    actual = found.st_size
    return None if actual == record.bytes else f"{file.name} has {actual:,} bytes, not {record.bytes:,}"


def check_checksums(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Read files and compare their checksums.

    Raises:
        CheckpointError: naming all files that differ.
    """
    found = (_checksum_problem(folder / name, record) for name, record in sorted(files.items()))
    _raise_all([problem for problem in found if problem is not None])


def _checksum_problem(file: Path, record: FileRecord) -> str | None:
    try:
        actual = checksum_of_file(file)
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    if actual == record.crc32:
        return None
    return f"{file.name} has been altered: checksum {actual:08x}, not {record.crc32:08x}"


def _raise_all(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more files" if len(problems) > SHOWN else ""
        raise CheckpointError("; ".join(problems[:SHOWN]) + more)


def checksum_of_file(path: Path) -> int:
    """zlib.crc32 of a file's bytes."""
    checksum = 0
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
    return checksum


def make_durable_folder(folder: Path) -> None:
    """Create a folder, and those above it, so that its name survives a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # The folder itself always: whoever created it may not have made its name durable
    for path in missing or [folder]:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
